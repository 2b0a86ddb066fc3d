"""DICOM by pydicom and NIfTI by nibabel, against SimpleITK; where the two differ, the convention is tested."""

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pydicom.pixels
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from mae_core.normalization import Reading, ValueRange
from pipelines.images.decode import inspect, read_values, unit_pixels
from tests.pipelines.images.field_files import scene


def dicom(stored: NDArray[Any], photometric: str = "MONOCHROME2", bits: int | None = None, **tags: Any) -> bytes:
    """Encode stored values [height width] or [frames height width], or [height width 3] with photometric RGB."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # pyright: ignore[reportArgumentType]
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.SamplesPerPixel = 3 if photometric not in ("MONOCHROME1", "MONOCHROME2") else 1
    file.PhotometricInterpretation = photometric
    if file.SamplesPerPixel == 3:
        file.PlanarConfiguration = 0
    elif stored.ndim == 3:
        file.NumberOfFrames = len(stored)
    shape = stored.shape[:2] if file.SamplesPerPixel == 3 else stored.shape[-2:]
    file.Rows, file.Columns = shape
    file.BitsAllocated = 8 * stored.dtype.itemsize
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = stored.tobytes()
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def by_simpleitk(content: bytes, folder: Path, suffix: str) -> NDArray[Any]:
    path = folder / f"file{suffix}"
    path.write_bytes(content)
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


FILM = scene(largest=4095)[:, :, 0]


def test_a_radiograph_is_what_simpleitk_makes_of_it(tmp_path: Path) -> None:
    content = dicom(FILM, bits=12)
    values, valid = read_values(content)
    assert (valid, values.dtype) == (None, np.uint16)
    np.testing.assert_array_equal(values[:, :, 0], by_simpleitk(content, tmp_path, ".dcm")[0])


def test_monochrome1_is_turned_so_that_more_is_brighter(tmp_path: Path) -> None:
    content = dicom(FILM, "MONOCHROME1", bits=12)
    values, _ = read_values(content)
    np.testing.assert_array_equal(values[:, :, 0], 4095 - FILM)
    # SimpleITK turns it by itself, by the values that occur.
    np.testing.assert_array_equal(values[:, :, 0], by_simpleitk(content, tmp_path, ".dcm")[0])
    assert inspect(content).notes == ("MONOCHROME1, inverted",)


def test_tomography_is_in_hounsfield_units(tmp_path: Path) -> None:
    content = dicom(FILM, bits=12, RescaleSlope="1", RescaleIntercept="-1024")
    values, _ = read_values(content)
    assert values.dtype == np.int16
    np.testing.assert_array_equal(values[:, :, 0], FILM.astype(int) - 1024)
    np.testing.assert_array_equal(values[:, :, 0], by_simpleitk(content, tmp_path, ".dcm")[0])
    fractions = dicom(FILM, bits=12, RescaleSlope="0.5", RescaleIntercept="-10")
    np.testing.assert_array_equal(read_values(fractions)[0][:, :, 0], (FILM * 0.5 - 10).astype(np.float32))


def test_colour_is_rgb_whatever_is_stored(tmp_path: Path) -> None:
    pixels = (scene(3) >> 8).astype(np.uint8)
    content = dicom(pixels, "RGB")
    np.testing.assert_array_equal(read_values(content)[0], pixels)
    ybr = np.asarray(pydicom.pixels.convert_color_space(pixels, "RGB", "YBR_FULL"))
    found, _ = read_values(dicom(ybr, "YBR_FULL"))
    assert np.abs(found.astype(int) - pixels).max() <= 2
    assert np.abs(found.astype(int) - by_simpleitk(dicom(ybr, "YBR_FULL"), tmp_path, ".dcm")[0]).max() <= 2


def test_frames_of_an_angiogram_are_chosen() -> None:
    frames = np.stack([scene(1, seed, largest=4095)[:, :, 0] for seed in range(4)])
    content = dicom(frames, bits=12)
    with pytest.raises(ValueError, match="several frames: 4"):
        inspect(content)
    for frame in range(4):
        np.testing.assert_array_equal(read_values(content, Reading(frames="all"), frame)[0][:, :, 0], frames[frame])


def edited(content: bytes, **tags: Any) -> bytes:
    file, buffer = pydicom.dcmread(io.BytesIO(content)), io.BytesIO()
    for name, value in tags.items():
        setattr(file, name, value)
    file.save_as(buffer)
    return buffer.getvalue()


def rescaling(slope: int, intercept: int) -> Dataset:
    """Return a functional group, as enhanced CT and PET have one for each frame."""
    group, values = Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = str(slope), str(intercept), "HU"
    group.PixelValueTransformationSequence = Sequence([values])
    return group


def test_each_frame_is_rescaled_by_its_own_group() -> None:
    frames = np.stack([FILM, FILM[::-1], FILM.T])
    content = dicom(frames, bits=12)
    own = edited(content, PerFrameFunctionalGroupsSequence=Sequence([rescaling(k + 1, -1000 * k) for k in range(3)]))
    shared = edited(content, SharedFunctionalGroupsSequence=Sequence([rescaling(2, -1000)]))
    for number, stored in enumerate(frames.astype(np.int64)):
        found = read_values(own, Reading(frames="all"), number)[0]
        np.testing.assert_array_equal(found[:, :, 0], stored * (number + 1) - 1000 * number)
        assert found.dtype == inspect(own, reading=Reading(frames="all")).dtype
        found = read_values(shared, Reading(frames="all"), number)[0]
        np.testing.assert_array_equal(found[:, :, 0], stored * 2 - 1000)


def test_dicom_whose_bits_lie_elsewhere_is_refused() -> None:
    content = dicom(FILM, bits=12)
    for tags, reason in (({"HighBit": 15}, "highest is bit 15"), ({"RescaleSlope": "0"}, "RescaleSlope is 0")):
        with pytest.raises(ValueError, match=reason):
            inspect(edited(content, **tags))


def test_a_damaged_tag_that_only_reading_asks_for_is_damage() -> None:
    content = dicom(FILM, bits=12, PixelPaddingValue=3)
    at = content.index(b"\x28\x00\x20\x01US") + 4
    with pytest.raises(ValueError, match="damaged"):
        read_values(content[:at] + b"U\0" + content[at + 2 :])


def test_two_orientations_of_a_volume_that_differ_are_said() -> None:
    image, turned = nibabel.Nifti1Image(VOLUME, np.eye(4)), np.diag([-1.0, 1, 1, 1])
    image.header.set_qform(turned, code=1)
    image.header.set_sform(np.eye(4), code=2)
    header = inspect(image.to_bytes(), reading=Reading(frames="all"))
    assert header.notes == ("qform turns the volume otherwise than sform, which is taken",)
    alike = read_values(nifti(VOLUME, np.eye(4)), Reading(frames="all"), 2)[0]
    np.testing.assert_array_equal(read_values(image.to_bytes(), Reading(frames="all"), 2)[0], alike)


def test_windows_of_the_file_serve_where_they_are_asked_for() -> None:
    own = ValueRange(dtype="uint16", kind="voi", by="image")
    content = dicom(FILM, bits=12, WindowCenter="2048", WindowWidth="1000")
    unit = unit_pixels(content, 1, own)
    np.testing.assert_allclose(unit[:, :, 0], ((FILM - 1548.0) / 999).clip(0, 1), atol=1e-6)
    turned = unit_pixels(dicom(FILM, "MONOCHROME1", bits=12, WindowCenter="2048", WindowWidth="1000"), 1, own)
    np.testing.assert_allclose(turned, 1 - unit, atol=1e-6)
    with pytest.raises(ValueError, match="no window in the file: say --range window"):
        unit_pixels(dicom(FILM, bits=12), 1, own)


def test_padding_is_no_data() -> None:
    stored = FILM.astype(np.int16)
    stored[:5] = -2000
    values, valid = read_values(dicom(stored, PixelPaddingValue=-2000))
    assert valid is not None
    np.testing.assert_array_equal(valid[:, :, 0], stored != -2000)
    np.testing.assert_array_equal(values[5:, :, 0], stored[5:])


def test_dicom_of_other_pixels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unsupported pixels: DICOM PALETTE COLOR"):
        inspect(dicom(FILM, "MONOCHROME2", PhotometricInterpretation="PALETTE COLOR"))
    with pytest.raises(ValueError, match="too many pixels: 40 x 40"):
        inspect(dicom(FILM), 100)
    with pytest.raises(ValueError, match="damaged"):
        read_values(dicom(FILM)[:-500])


VOLUME = np.stack([scene(1, seed, side_px=24, largest=3000)[:, :20, 0] for seed in range(9)], axis=2).astype(np.int16)


def nifti(data: NDArray[Any], affine: NDArray[Any], suffix: str = ".nii", **header: Any) -> bytes:
    image = nibabel.Nifti1Image(data, affine)
    content = bytearray(image.to_bytes())
    if header:
        edited = nibabel.Nifti1Header(bytes(content[:348]))
        for name, value in header.items():
            edited[name] = value
        content[:348] = edited.binaryblock
    if suffix == ".nii.gz":
        import gzip

        return gzip.compress(bytes(content), mtime=0)  # Equal volumes are equal bytes.
    return bytes(content)


def test_slices_are_what_simpleitk_makes_of_them_in_one_orientation(tmp_path: Path) -> None:
    """The same patient, stored by three scanners in different directions, gives the same slices."""
    right_front_up = np.diag([2.0, 2.0, 3.0, 1.0])
    left_front_up = np.diag([-2.0, 2.0, 3.0, 1.0])
    stored = {
        "a": nifti(VOLUME, right_front_up),
        "b": nifti(VOLUME[::-1], left_front_up, ".nii.gz"),
        "c": nifti(
            np.ascontiguousarray(VOLUME.transpose(2, 0, 1)),
            np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]]),
        ),
    }
    for axis, number, expected in (
        ("axial", 4, VOLUME[:, :, 4].T[::-1, ::-1]),
        ("coronal", 7, VOLUME[:, 7, :].T[::-1, ::-1]),
        ("sagittal", 11, VOLUME[11, :, :].T[::-1, ::-1]),
    ):
        reading = Reading(frames="all", axis=axis)  # pyright: ignore[reportArgumentType]
        for content in stored.values():
            header = inspect(content, reading=reading)
            values, valid = read_values(content, reading, number)
            assert valid is None
            np.testing.assert_array_equal(values[:, :, 0], expected)
            assert (header.height_px, header.width_px, header.dtype) == (*expected.shape, "int16")
    path = tmp_path / "a.nii"
    path.write_bytes(stored["c"])
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    # LPS to [up, back, left]: the front is first, and the patient's right.
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(image)[4], read_values(stored["c"], Reading(frames="all"), 4)[0][:, :, 0]
    )


def test_a_slope_of_zero_means_no_scaling() -> None:
    """SimpleITK would add the intercept; nibabel and the standard do not."""
    plain = np.eye(4)
    zero = nifti(VOLUME, plain, scl_slope=0.0, scl_inter=100.0)
    found, _ = read_values(zero, Reading(frames="all"), 3)
    np.testing.assert_array_equal(found[:, :, 0], VOLUME[:, :, 3].T[::-1, ::-1])
    assert found.dtype == np.int16
    scaled = nifti(VOLUME, plain, scl_slope=0.5, scl_inter=100.0)
    found, _ = read_values(scaled, Reading(frames="all"), 3)
    np.testing.assert_array_equal(found[:, :, 0], (VOLUME[:, :, 3].T[::-1, ::-1] * 0.5 + 100).astype(np.float32))


def test_volumes_that_cannot_be_meant_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="several frames: 9 pages, frames or slices"):
        inspect(nifti(VOLUME, np.eye(4)))
    with pytest.raises(ValueError, match="unsupported pixels: NIfTI of complex64"):
        inspect(nifti(VOLUME.astype(np.complex64), np.eye(4)))
    huge = nifti(VOLUME, np.eye(4), ".nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="too many pixels: a volume of"):
        inspect(huge, reading=Reading(frames="first"))
    with pytest.raises(ValueError, match="damaged image"):
        read_values(nifti(VOLUME, np.eye(4))[:-500], Reading(frames="first"))


WHOLE = [
    dicom(FILM, "MONOCHROME1", bits=12, RescaleSlope="1", RescaleIntercept="-1024", PixelPaddingValue=3),
    nifti(VOLUME, np.eye(4), ".nii.gz"),
    nifti(VOLUME, np.eye(4)),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_an_image_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    places = st.integers(0, len(content) - 1) | st.integers(0, 900)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    damaged = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    reading = Reading(frames="first")
    try:
        header = inspect(damaged, 100_000, reading)
        values, _ = read_values(damaged, reading, max_pixels=100_000)
    except ValueError:
        return
    assert values.shape == (header.height_px, header.width_px, header.channels)


@pytest.mark.parametrize(
    "direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, -1, 0, 1, 0, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)]
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_slices_of_nrrd_are_what_simpleitk_makes_of_them(
    direction: tuple[int, ...], is_packed: bool, tmp_path: Path
) -> None:
    image = SimpleITK.GetImageFromArray(VOLUME.transpose(2, 1, 0))
    image.SetDirection(direction)
    path = tmp_path / "volume.nrrd"
    SimpleITK.WriteImage(image, str(path), is_packed)
    # [up back left] from SimpleITK, whose order of axes is the reverse.
    turned = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS"))
    for reading, meant in (
        (Reading(frames="all", axis="axial"), turned[2]),
        (Reading(frames="all", axis="coronal"), turned[::-1, -3]),
        (Reading(frames="all", axis="sagittal"), turned[::-1, :, -3]),
    ):
        found, valid = read_values(path.read_bytes(), reading, 2)
        assert valid is None
        np.testing.assert_array_equal(found[:, :, 0], meant)
        assert inspect(path.read_bytes(), reading=reading).height_px == len(meant)


def test_nrrd_that_cannot_be_read_whole_is_refused_by_name(tmp_path: Path) -> None:
    def written(values: NDArray[Any], header: dict[str, Any] | None = None, name: str = "a.nrrd") -> bytes:
        nrrd.write(str(tmp_path / name), values, header)
        return (tmp_path / name).read_bytes()

    image, raw = np.arange(12, dtype=np.int16).reshape(3, 4), {"encoding": "raw"}
    np.testing.assert_array_equal(read_values(written(image))[0][:, :, 0], image.T)
    vectors = {"kinds": ["vector", "domain", "domain", "domain"]}
    refused = {
        "external data": written(VOLUME, name="a.nhdr"),
        "other dimensions": written(np.zeros((3, 4, 4, 4), np.uint8), vectors),
        "unclear orientation": written(VOLUME, {"space": "scanner-xyz", "space directions": np.eye(3)}),
        "unsupported pixels: NRRD of encoding": written(image, {"encoding": "bzip2"}),
        "damaged image": written(VOLUME, raw)[:-20],
        "too many pixels": written(image, raw).replace(b"sizes: 3 4", b"sizes: 99999 99999"),
    }
    for reason, content in refused.items():
        with pytest.raises(ValueError, match=reason):
            read_values(content, Reading(frames="all"))
    # A gzip stream that unpacks to more than the header says is not unpacked further.
    bomb = written(image, {"encoding": "gzip"})
    head = bomb[: bomb.index(b"\n\n") + 2]
    np.testing.assert_array_equal(read_values(head + gzip.compress(bytes(10**8)))[0], 0)
