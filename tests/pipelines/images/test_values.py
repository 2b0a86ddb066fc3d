"""Images beyond 8 bits and three channels are read exactly, or refused by name; nothing is lost without a word."""

import io
import struct
import warnings
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import rasterio.errors
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rasterio.io import MemoryFile

from mae_core.normalization import Reading, ValueRange
from mae_core.values import limits_of, to_unit
from pipelines.images.crops import crop_values_into, planes_of
from pipelines.images.decode import (
    Scratch,
    decode,
    evaluation_view,
    input_view,
    inspect,
    preview,
    read_values,
    unit_pixels,
)
from pipelines.images.decode.plain import upright
from pipelines.images.decode.stored import pack
from tests.pipelines.images.field_files import cloud_optimised, deep_png, npy, png, scene, slide, tiff, tiff_pages


def exact(content: bytes, reading: Reading = Reading()) -> NDArray[Any]:  # noqa: B008
    """Return the values, all of which are data."""
    values, valid = read_values(content, reading)
    assert valid is None
    header = inspect(content, reading=reading)
    assert (header.dtype, header.channels) == (values.dtype.name, values.shape[2])
    assert (header.height_px, header.width_px) == values.shape[:2]
    return values


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13, 64])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiff_and_arrays_of_every_type_and_number_of_channels_are_read_exactly(dtype: str, channels: int) -> None:
    values = scene(channels, side_px=80).astype(np.int64) - (30000 if dtype == "int16" else 0)
    values = (values >> 8 if dtype == "uint8" else values / 7 if dtype == "float32" else values).astype(dtype)
    photometric = "rgb" if channels == 3 else "minisblack"
    for content in (
        tiff(values if channels > 1 else values[:, :, 0]),
        tiff_pages(np.moveaxis(values, 2, 0), photometric=photometric, planarconfig="separate")
        if channels > 1
        else tiff(values[:, :, 0], compression="zlib", predictor=True),
        npy(values),
        npy(np.moveaxis(values, 2, 0)) if channels in (2, 13) else npy(values.astype(values.dtype.newbyteorder(">"))),
    ):
        np.testing.assert_array_equal(exact(content), values)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_of_16_bits_keeps_them(channels: int) -> None:
    values = scene(channels)
    np.testing.assert_array_equal(exact(deep_png(values)), values)
    if channels == 1:
        np.testing.assert_array_equal(exact(png(Image.fromarray(values[:, :, 0]))), values)
    opaque = np.concatenate([values, np.full_like(values[:, :, :1], 65535)], axis=2)
    np.testing.assert_array_equal(exact(deep_png(opaque)), values)
    clear = np.concatenate([values, np.zeros_like(values[:, :, :1])], axis=2)
    assert (exact(deep_png(clear)) == 65535).all(), "white"


def test_white_is_zero_is_turned_whatever_the_bits() -> None:
    for values in (scene(), (scene() >> 8).astype(np.uint8)):
        content = tiff(values[:, :, 0], photometric="miniswhite")
        white = np.iinfo(values.dtype).max
        np.testing.assert_array_equal(exact(content), white - values)
        assert "white is zero, inverted" in inspect(content).notes
    np.testing.assert_array_equal(
        decode(tiff((scene() >> 8).astype(np.uint8)[:, :, 0], photometric="miniswhite"), 1), 255 - (scene() >> 8)
    )
    with pytest.raises(ValueError, match="white is zero, but the largest value is unknown"):
        inspect(tiff(scene()[:, :, 0].astype(np.float32), photometric="miniswhite"))


def geotiff(values: NDArray[Any], **options: Any) -> bytes:
    """Encode [height width channels] as rasterio and GDAL do it by default."""
    height, width, count = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": values.dtype.name}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000)}
    with MemoryFile() as memory:
        with memory.open(**profile, **place, **options) as file:
            file.write(np.moveaxis(values, 2, 0))
        return memory.read()


def bands_of(content: bytes) -> NDArray[Any]:
    """Read [height width channels] with rasterio."""
    with MemoryFile(content) as memory, memory.open() as file:
        return np.moveaxis(file.read(), 0, 2)


@pytest.mark.parametrize("compress", ["none", "lzw", "deflate", "zstd"])
def test_geotiffs_are_what_rasterio_makes_of_them(compress: str) -> None:
    for values in (scene(1), scene(2), scene(13), scene(5).astype(np.int16), (scene(4) / 65535).astype(np.float32)):
        predictor = 3 if values.dtype.kind == "f" else 2
        options = {} if compress == "none" else {"compress": compress, "predictor": predictor}
        for layout in ("pixel", "band"):
            content = geotiff(values, interleave=layout, tiled=True, blockxsize=16, blockysize=16, **options)
            np.testing.assert_array_equal(exact(content), bands_of(content))
            np.testing.assert_array_equal(exact(content), values)


def test_near_infrared_is_not_composited_away() -> None:
    """GDAL declares the fourth of four bytes as unassociated alpha, whatever it is."""
    values = (scene(4) >> 8).astype(np.uint8)
    content = geotiff(values)
    with pytest.raises(ValueError, match=r"unclear fourth band: .* --fourth-band band"):
        decode(content, 3)
    with pytest.raises(ValueError, match="unclear fourth band"):
        read_values(content)
    np.testing.assert_array_equal(exact(content, Reading(fourth_band="band")), values)
    over_white = exact(content, Reading(fourth_band="alpha")).astype(int)
    image = Image.alpha_composite(Image.new("RGBA", (40, 40), "white"), Image.fromarray(values))
    assert np.abs(over_white - np.asarray(image.convert("RGB"))).max() <= 1


def test_a_mask_as_fourth_band_is_transparency() -> None:
    values = (scene(4) >> 8).astype(np.uint8)
    values[:, :, 3] = np.where(values[:, :, 3] > 100, 255, 0)
    content = geotiff(values)
    found = decode(content, 3)
    np.testing.assert_array_equal(found, np.where(values[:, :, 3:] == 0, 255, values[:, :, :3]))
    assert inspect(content).notes == ("alpha composited over white",)


def test_two_bands_stay_two() -> None:
    values = (scene(2) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(exact(geotiff(values)), values)
    with pytest.raises(ValueError, match="other pixels: uint8, channels: 2"):
        decode(geotiff(values), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_overviews_are_no_pages(channels: int) -> None:
    for values in (scene(channels), (scene(channels) >> 8).astype(np.uint8)):
        pixels = values[:, :, 0] if channels == 1 else values
        content = cloud_optimised(pixels, photometric="minisblack" if channels == 1 else "rgb")
        header = inspect(content)
        assert (header.height_px, header.num_frames, header.notes) == (40, 1, ("overviews left out",))
        np.testing.assert_array_equal(exact(content), values)
        if values.dtype == np.uint8:
            np.testing.assert_array_equal(decode(content, channels), values)


def test_pages_are_chosen_or_refused() -> None:
    pages = np.stack([scene(1, seed)[:, :, 0] for seed in range(3)])
    for content in (tiff_pages(pages, photometric="minisblack"), tiff_pages(pages, imagej=True)):
        with pytest.raises(ValueError, match=r"several frames: 3 .* --frames first"):
            inspect(content)
        assert inspect(content, reading=Reading(frames="all")).num_frames == 3
        for frame in range(3):
            found, _ = read_values(content, Reading(frames="all"), frame)
            np.testing.assert_array_equal(found[:, :, 0], pages[frame])


def test_pixels_without_data_are_marked_and_become_nothing() -> None:
    values = scene(2, largest=30000).astype(np.int16)
    values[:10] = -9999
    content = geotiff(values, nodata=-9999)
    found, valid = read_values(content)
    assert valid is not None
    np.testing.assert_array_equal(valid, values != -9999)
    np.testing.assert_array_equal(found[10:], values[10:])
    own = ValueRange(dtype="int16", kind="min-max", by="image")
    unit = unit_pixels(content, 2, own)
    assert unit[:10].max() == 0
    assert unit.max() == 1
    assert limits_of(found, own, valid)[0].min() >= 0, "nodata is not the minimum"
    fractions = (scene(1)[:, :, 0] / 65535).astype(np.float32)
    fractions[0, 0] = np.nan
    for content in (tiff(fractions), npy(fractions)):
        found, valid = read_values(content)
        assert valid is not None
        assert np.argwhere(~valid).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="no data"):
        read_values(tiff(np.full((8, 8), np.nan, np.float32)))
    with pytest.raises(ValueError, match="infinite values"):
        read_values(npy(np.full((8, 8), np.inf, np.float32)))


def test_whole_numbers_of_32_bits_are_exact_or_refused() -> None:
    values = scene().astype(np.int32)
    for content in (tiff(values[:, :, 0]), npy(values[:, :, 0])):
        np.testing.assert_array_equal(exact(content), values.astype(np.float32))
    for content in (tiff(values[:, :, 0] + 2**25 + 1), npy(values[:, :, 0] + 2**25 + 1)):
        with pytest.raises(ValueError, match="int32 values above 16,777,216"):
            read_values(content)


def test_sixteen_bits_become_eight_only_if_they_use_their_range() -> None:
    values = scene(3)
    found = decode(deep_png(values), 3)
    assert np.abs(found.astype(float) - values / 257).max() <= 0.51
    with pytest.raises(ValueError, match=r"16 bits: values run from 0 to 4095, a fraction of 0 to 65535.*--range"):
        decode(deep_png(scene(3, largest=4095)), 3)


def test_what_cannot_be_meant_is_refused_by_name() -> None:
    refused = {
        "too many pixels: 40 x 40": (tiff(scene(2)), 1599),
        "too many channels: 65": (tiff(np.zeros((8, 8, 65), np.uint8)), 10**6),
        "unsupported pixels: complex": (tiff(np.zeros((8, 8), np.complex64)), 10**6),
        "unclear layout": (npy(np.zeros((3, 40, 3), np.uint16)), 10**6),
        "other dimensions: an array of 4": (npy(np.zeros((3, 40, 40, 3), np.uint16)), 10**6),
        "damaged image: 0 bytes": (npy(np.zeros((40, 40), np.uint16))[:-3200], 10**6),
        "objects or records": (npy(np.zeros((4, 4), [("a", "u1")])), 10**6),
    }
    for reason, (content, max_pixels) in refused.items():
        with pytest.raises(ValueError, match=reason):
            inspect(content, max_pixels)


def test_bombs_are_refused_by_their_header() -> None:
    header = tiff(scene(13))
    with pytest.raises(ValueError, match="too many pixels: 40 x 40 is more than max_pixels 100"):
        read_values(header, max_pixels=100)
    circle = bytearray(tiff(np.zeros((8, 8, 2), np.uint8)))
    with tifffile.TiffFile(io.BytesIO(circle)) as file:
        first = file.pages[0].offset
        num_tags = int.from_bytes(circle[first : first + 2], "little")
    end = first + 2 + 12 * num_tags
    circle[end : end + 4] = first.to_bytes(4, "little")
    with pytest.raises(ValueError, match="pages in a circle"):
        inspect(bytes(circle))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_storage_is_lossless(dtype: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    values = (
        rng.normal(0, 1e4, (17, 23, channels)) if dtype == "float32" else rng.integers(0, 2**16, (17, 23, channels))
    )
    values = values.astype(dtype)
    limits = np.arange(channels, dtype=np.float64) - 0.5, np.arange(channels, dtype=np.float64) + 7.25
    content = pack(values, limits)
    np.testing.assert_array_equal(exact(content), values)
    found, first = planes_of(content, Scratch())
    assert first == 0
    np.testing.assert_array_equal(np.moveaxis(found, 0, 2), values)
    assert found.dtype == values.dtype
    own = ValueRange(dtype=dtype, kind="percentiles", by="image", percentiles=(1.0, 99.0))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(unit_pixels(content, channels, own), to_unit(values, *limits))


def test_stored_values_from_elsewhere_cannot_claim_much_memory() -> None:
    """Bytes that are all zero take no space, so a short file could claim any size."""
    content = bytearray(pack(np.zeros((64, 64, 1), np.uint16)))
    assert len(content) < 100
    content[8:16] = struct.pack("<II", 2**31, 2**31)
    own = ValueRange(dtype="uint16", kind="full", low=(0.0,), high=(65535.0,))
    with pytest.raises(ValueError, match="too many pixels: 2147483648 x 2147483648"):
        input_view(bytes(content), 1, (32, 32), own)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_an_image_and_nothing_else(data: st.DataObject) -> None:
    whole = [tiff(scene(13)), tiff(scene(2)), deep_png(scene(3)), npy(scene(2)), pack(scene(2)), geotiff(scene(5))]
    content = bytearray(data.draw(st.sampled_from(whole)))
    places = st.integers(0, len(content) - 1) | st.integers(0, 200)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    damaged = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        header = inspect(damaged, 100_000)
        values, _ = read_values(damaged, max_pixels=100_000)
    except ValueError:
        return
    assert values.shape == (header.height_px, header.width_px, header.channels)


def test_crops_of_values_are_what_pillow_makes_of_them() -> None:
    values = scene(2, side_px=90)
    low, high = np.array([1000.0, 0.0]), np.array([60000.0, 65535.0])
    unit = to_unit(values, low, high)
    content = pack(values)
    for box in ((0, 0, 90, 90), (10, 20, 30, 50), (3, 7, 80, 61), (40, 40, 5, 4)):
        top, left, height, width = box
        for flip in (False, True):
            out = np.empty((24, 32, 2), np.float32)
            crop_values_into(out, content, (low, high), box, flip, Scratch())
            part = unit[top : top + height, left : left + width]
            for channel in range(2):
                image = Image.fromarray(np.ascontiguousarray(part[:, :, channel]))
                expected = np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC)).clip(0, 1)
                np.testing.assert_allclose(out[:, :: -1 if flip else 1, channel], expected, atol=2e-6)
    out = np.empty((90, 90, 2), np.float32)
    crop_values_into(out, content, (low, high), (0, 0, 90, 90), False, Scratch())
    np.testing.assert_array_equal(out, unit)
    with pytest.raises(ValueError, match="is not within the image of 90 x 90"):
        crop_values_into(out, content, (low, high), (1, 0, 90, 90), False, Scratch())


def test_a_file_gives_the_same_input_whatever_it_is_stored_in() -> None:
    """What training reads from a shard equals what a served model reads from any file of the same values."""
    values = scene(3, side_px=64)
    for own in (
        ValueRange(dtype="uint16", kind="window", low=(1000.0,) * 3, high=(50000.0,) * 3),
        ValueRange(dtype="uint16", kind="percentiles", by="image", percentiles=(2.0, 98.0)),
    ):
        limits = limits_of(values, own)
        files = [tiff(values, photometric="rgb"), geotiff(values), deep_png(values), npy(values)]
        stored = pack(values, limits if own.by == "image" else None)
        expected = evaluation_view(to_unit(values, *limits), (32, 32))
        for content in (*files, stored):
            np.testing.assert_array_equal(input_view(content, 3, (32, 32), own), expected)
    with pytest.raises(ValueError, match="other pixels: uint8, where uint16 is read"):
        input_view(tiff((values >> 8).astype(np.uint8), photometric="rgb"), 3, (32, 32), own)
    with pytest.raises(ValueError, match="other pixels: 2 channels, where 3 are read"):
        input_view(npy(values[:, :, :2]), 3, (32, 32), own)


def jpeg2000(values: NDArray[Any], bits: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values.squeeze(), level=0, reversible=True, bitspersample=bits))


def test_jpeg_2000_is_what_rasterio_makes_of_it() -> None:
    """Pillow would scale twelve bits up by sixteen."""
    for channels, bits in ((1, 12), (3, 16), (3, 8), (1, 16)):
        values = scene(channels, largest=2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)
        content = jpeg2000(values, bits)
        np.testing.assert_array_equal(exact(content), values)
        with warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning):
            np.testing.assert_array_equal(exact(content), bands_of(content))
    with pytest.raises(ValueError, match="too many pixels"):
        inspect(jpeg2000(scene(), 16), 100)
    with pytest.raises(ValueError, match="damaged"):
        read_values(jpeg2000(scene(), 16)[:300])


def test_avif_and_jpeg_xl_keep_their_bits() -> None:
    pixels = (scene(3) >> 8).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "AVIF", quality=100, subsampling="4:4:4")
    content = file.getvalue()
    np.testing.assert_array_equal(decode(content, 3), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    twelve = scene(3, largest=4095)
    for lossless in (
        bytes(imagecodecs.avif_encode(twelve, level=100, bitspersample=12)),
        bytes(imagecodecs.jpegxl_encode(twelve, lossless=True, bitspersample=12)),
    ):
        np.testing.assert_array_equal(exact(lossless), twelve)
        with pytest.raises(ValueError, match="too many pixels: 40 x 40"):
            inspect(lossless, 100)
    rng = np.random.default_rng(0)
    for shape in ((40, 40), (8, 300, 3), (512, 17), (90, 160, 3), (4000, 3)):
        values = rng.integers(0, 65536, shape, dtype=np.uint16)
        found = exact(bytes(imagecodecs.jpegxl_encode(values, lossless=True, effort=1)))
        np.testing.assert_array_equal(found.squeeze(), values)
    with pytest.raises(ValueError, match=r"unsupported pixels: uint8 of \(40, 40, 4\)"):
        inspect(bytes(imagecodecs.jpegxl_encode((scene(4) >> 8).astype(np.uint8))))
    with pytest.raises(ValueError, match=r"not a known image format: a container of b'mp42'"):
        inspect(b"\0\0\0\x18ftypmp42" + bytes(100))


def test_people_see_every_kind_of_image() -> None:
    for content in (tiff(scene(13)), tiff(scene(1)[:, :, 0]), geotiff((scene(4) >> 8).astype(np.uint8)), npy(scene(2))):
        shown = preview(content)
        assert (shown.shape, shown.dtype) == ((40, 40, 3), np.uint8)
        assert shown.min() == 0
        assert shown.max() == 255


def test_jpegs_with_bytes_that_belong_to_nothing_are_as_pillow_reads_them() -> None:
    image = Image.fromarray((scene(3) >> 8).astype(np.uint8))
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        image.convert(mode).save(file, "JPEG", quality=95)
        whole, channels = file.getvalue(), len(mode)
        table, size = whole.index(b"\xff\xdb"), whole.index(b"\xff\xc0")
        in_header = whole[:table] + b"\0abc" + whole[table:size] + b"xyz" + whole[size:]
        for content in (in_header, whole[:-2] + bytes(64) + b"\xff\xd9"):
            notes: list[str] = []
            found = decode(content, channels, notes=notes)
            expected = np.asarray(Image.open(io.BytesIO(content)))
            np.testing.assert_array_equal(found.squeeze(), expected.squeeze())
            assert notes == ["JPEG with extraneous bytes before marker"]
        for damaged in (
            in_header[: len(in_header) // 2],
            in_header[:-60] + b"\xff\xd9",
            whole[:-2] + bytes(range(64)) + b"\xff\xd9",
        ):
            with pytest.raises(ValueError, match="damaged JPEG"):
                decode(damaged, channels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_once_whoever_decodes_it(orientation: int) -> None:
    """Pillow turns a TIFF upright by itself, unlike every other format."""
    for values in (scene(3, largest=255).astype(np.uint8)[:, :30], scene(2)[:, :30]):
        content = tiff(values, extratags=[(274, 3, 1, orientation, True)])
        expected = upright(values, orientation)
        found, header = read_values(content)[0], inspect(content)
        np.testing.assert_array_equal(found, expected)
        assert (header.height_px, header.width_px) == expected.shape[:2]
        if values.dtype == np.uint8:
            np.testing.assert_array_equal(decode(content, 3), expected)


def test_pages_of_few_bits_use_the_range_of_eight() -> None:
    for bits in (1, 4):
        stored = scene(largest=2**bits - 1)[:, :, 0].astype(np.uint8)
        kind: dict[str, Any] = {"bitspersample": bits} if bits > 1 else {}
        for photometric in ("minisblack", "miniswhite"):
            file = io.BytesIO()
            with tifffile.TiffWriter(file) as writer:
                for page in (stored, stored[::-1]):
                    writer.write(page > 0 if bits == 1 else page, photometric=photometric, **kind)
            found = read_values(file.getvalue(), Reading(frames="all"), 1)[0][:, :, 0]
            meant = stored[::-1] * (255 // (2**bits - 1))
            np.testing.assert_array_equal(found, meant if photometric == "minisblack" else 255 - meant)


def test_a_page_of_another_kind_is_refused() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(scene()[:, :, 0])
        writer.write(scene()[:, :, 0], photometric="miniswhite")
    with pytest.raises(ValueError, match="other pages: page 1"):
        read_values(file.getvalue(), Reading(frames="all"), 1)


@pytest.mark.parametrize("compression", ["lerc", "jpeg2000", "jpegxl", "png"])
def test_compressions_that_pillow_lacks_are_read_in_eight_bits_too(compression: str) -> None:
    values = scene(3, largest=255).astype(np.uint8)
    np.testing.assert_array_equal(read_values(tiff(values, compression=compression))[0], values)


def test_a_palette_of_eight_bits_is_refused_instead_of_black() -> None:
    palette = np.arange(768, dtype=np.uint16).reshape(3, 256) % 256
    content = tiff_pages(scene(largest=255)[:, :, 0].astype(np.uint8), photometric="palette", colormap=palette)
    with pytest.raises(ValueError, match="palette of 8 bits"):
        inspect(content)


def heic(values: NDArray[Any], mode: str, **options: Any) -> bytes:
    """Encode without loss."""
    file, (height, width) = io.BytesIO(), values.shape[:2]
    image = pillow_heif.from_bytes(mode, (width, height), np.ascontiguousarray(values).tobytes())
    image.save(file, quality=-1, chroma=444, matrix_coefficients=0, **options)
    return file.getvalue()


def test_heic_is_read_as_coded_and_turned_once() -> None:
    for bits, dtype in ((8, np.uint8), (10, np.uint16), (12, np.uint16)):
        values = scene(3, largest=2**bits - 1).astype(dtype)[:, :30]
        found, _ = read_values(heic(values, "RGB" if bits == 8 else f"RGB;{bits}"))
        np.testing.assert_array_equal(found, values)
    photograph = scene(3, largest=255).astype(np.uint8)[:, :30]
    np.testing.assert_array_equal(decode(heic(photograph, "RGB"), 3), photograph)
    exif = Image.Exif()
    exif[274] = 6
    turned = heic(photograph, "RGB", exif=exif.tobytes())
    np.testing.assert_array_equal(read_values(turned)[0], np.asarray(pillow_heif.open_heif(turned)))
    np.testing.assert_array_equal(read_values(turned)[0], upright(photograph, 6))
    header = inspect(turned)
    assert (header.height_px, header.width_px, header.orientation) == (30, 40, 1)


def test_heic_of_too_many_pixels_is_refused_by_its_header() -> None:
    content = bytearray(heic(scene(3, largest=255).astype(np.uint8), "RGB"))
    at = content.index(b"ispe") + 8
    content[at : at + 8] = struct.pack(">II", 20_000, 20_000)
    with pytest.raises(ValueError, match="damaged image"):
        read_values(bytes(content))
    with pytest.raises(ValueError, match="too many pixels: 40 x 40"):
        inspect(bytes(content), max_pixels=1599)
    with pytest.raises(ValueError, match="damaged"):
        read_values(heic(scene(3, largest=255).astype(np.uint8), "RGB")[:-100])


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg2000"])
def test_a_slide_is_its_scan_and_nothing_else(compression: str | None) -> None:
    scan = scene(3, largest=255, side_px=48).astype(np.uint8)
    content = slide(scan, compression=compression)
    np.testing.assert_array_equal(read_values(content)[0], scan)
    np.testing.assert_array_equal(decode(content, 3), scan)
    assert inspect(content).num_frames == 1
    assert inspect(content).notes == ("overviews left out",)


def test_channels_of_ome_are_channels_and_the_rest_are_frames() -> None:
    values = scene(12).reshape(40, 40, 3, 4).transpose(2, 3, 0, 1)
    for axes, frames in (
        ("ZCYX", [values[z].transpose(1, 2, 0) for z in range(3)]),
        ("CZYX", [values[:, z].transpose(1, 2, 0) for z in range(4)]),
        ("TZYX", [values[t, z][:, :, None] for t in range(3) for z in range(4)]),
    ):
        content = tiff_pages(values, ome=True, photometric="minisblack", metadata={"axes": axes})
        header = inspect(content, reading=Reading(frames="all"))
        assert (header.num_frames, header.channels) == (len(frames), frames[0].shape[2])
        for number, meant in enumerate(frames):
            np.testing.assert_array_equal(read_values(content, Reading(frames="all"), number)[0], meant)
    content = tiff_pages(values[0], ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    np.testing.assert_array_equal(read_values(content)[0], values[0].transpose(1, 2, 0))
    three = (values[:, 0] >> 8).astype(np.uint8)
    content = tiff_pages(three, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    np.testing.assert_array_equal(decode(content, 3), three.transpose(1, 2, 0))


def test_series_of_ome_are_frames_if_they_are_alike() -> None:
    def written(*series: NDArray[np.uint16]) -> bytes:
        file = io.BytesIO()
        with tifffile.TiffWriter(file, ome=True) as writer:
            for values in series:
                writer.write(values, photometric="minisblack", metadata={"axes": "CYX"})
        return file.getvalue()

    first, second = scene(2, 1).transpose(2, 0, 1), scene(2, 2).transpose(2, 0, 1)
    content = written(first, second)
    assert inspect(content, reading=Reading(frames="all")).num_frames == 2
    for number, meant in enumerate((first, second)):
        found = read_values(content, Reading(frames="all"), number)[0]
        np.testing.assert_array_equal(found, meant.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="other pages: the 2 series"):
        inspect(written(first, second[:, ::2]), reading=Reading(frames="all"))


def test_ome_with_missing_pages_is_refused() -> None:
    """Its XML names pages that another file may have, which is not looked for."""
    content = tiff_pages(scene(2).transpose(2, 0, 1), ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match="damaged image"):
        read_values(content.replace(b'SizeC="2"', b'SizeC="9"'), Reading(frames="all"))


def test_avif_of_more_bits_that_is_to_be_turned_is_refused() -> None:
    content = bytes(imagecodecs.avif_encode(scene(3, largest=1023), level=100, bitspersample=10))
    assert inspect(content).format == "AVIF"
    at = content.index(b"ipco") + 4
    turned = content[:at] + b"\0\0\0\x09irot\x01" + content[at:]
    with pytest.raises(ValueError, match="AVIF of more than 8 bits to be turned"):
        inspect(turned)
