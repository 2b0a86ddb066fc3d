"""Restart markers change no pixel, slices are what decoding all gives, and what is crafted is refused."""

import io
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.decode import decode, inspect
from pipelines.encode import encode
from pipelines.jpeg import read_header
from pipelines.jpeg.restarts import MAX_GROWTH, with_restarts
from pipelines.jpeg.slice import decode_box, decode_crop, find_segments

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1", "gray")


def photograph(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, a sharp edge and noise, so that blocks differ and codes of every length occur."""
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    noise = np.random.default_rng(seed).integers(0, 60, (height_px, width_px, 3))
    planes = [rows * 190 // height_px, columns * 190 // width_px, 190 * (rows > columns)]
    return (np.stack(planes, axis=2) + noise).astype(np.uint8)


@lru_cache(maxsize=64)
def jpeg(height_px: int, width_px: int, subsampling: str = "4:2:0", seed: int = 0, **options: int) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(photograph(height_px, width_px, seed))
    image = image.convert("L") if subsampling == "gray" else image
    kind = {} if subsampling in ("gray", "4:4:0") else {"subsampling": subsampling}
    image.save(file, "JPEG", **{"quality": 95, **options, **kind})
    content = file.getvalue()
    if subsampling == "4:4:0":
        # Pillow writes none. In a square file of 4:2:2 with whole MCUs the factors can be exchanged: the result is a
        # valid 4:4:0 of other pixels.
        square = max(height_px, width_px) + 15 & ~15
        file = io.BytesIO()
        Image.fromarray(photograph(square, square, seed)).save(file, "JPEG", quality=95, subsampling="4:2:2")
        content = file.getvalue().replace(b"\x01\x21\x00", b"\x01\x12\x00", 1)
    return content


images = st.builds(
    jpeg,
    st.integers(1, 90),
    st.integers(1, 130),
    st.sampled_from(SUBSAMPLINGS),
    st.integers(0, 3),
    quality=st.sampled_from([30, 75, 95, 100]),
    optimize=st.sampled_from([0, 1]),
)


def rewritten(content: bytes, interval: int) -> tuple[bytes, np.ndarray] | None:
    """With restart markers whatever the file grows by."""
    from pipelines.jpeg import restarts as jpeg_restarts
    from pipelines.jpeg.scan import read_scan

    header = read_header(content)
    return jpeg_restarts._rewritten(content, header, read_scan(content, header), interval)


@settings(max_examples=60, deadline=None)
@given(content=images, data=st.data())
def test_a_slice_of_any_file_is_what_decoding_all_gives(content: bytes, data: st.DataObject) -> None:
    header = read_header(content)
    divisors = [k for k in range(1, header.mcus_per_row + 1) if header.mcus_per_row % k == 0]
    found = rewritten(content, data.draw(st.sampled_from(divisors)))
    assert found is not None
    channels = data.draw(st.sampled_from([1, 3]))
    expected = decode(content, channels)
    np.testing.assert_array_equal(decode(found[0], channels), expected)
    for _ in range(4):
        height = data.draw(st.integers(1, header.height_px))
        width = data.draw(st.integers(1, header.width_px))
        top = data.draw(st.integers(0, header.height_px - height))
        left = data.draw(st.integers(0, header.width_px - width))
        pixels, (row, column) = decode_box(*found, (top, left, height, width), channels)
        crop = expected[top : top + height, left : left + width]
        np.testing.assert_array_equal(pixels[row : row + height, column : column + width], crop)


@settings(max_examples=25, deadline=None)
@given(content=images, first=st.integers(1, 9), second=st.integers(1, 9))
def test_files_that_have_restart_markers_get_others(content: bytes, first: int, second: int) -> None:
    per_row = read_header(content).mcus_per_row
    pair = [rewritten(content, k if per_row % k == 0 else per_row) for k in (first, second)]
    assert pair[0] is not None
    assert pair[1] is not None
    interval = read_header(pair[1][0]).restart_interval
    again = rewritten(pair[0][0], interval)
    assert again is not None
    assert len(again[1]) == len(pair[1][1])
    np.testing.assert_array_equal(decode(again[0], 3), decode(content, 3))
    np.testing.assert_array_equal(again[1], find_segments(again[0], read_header(again[0])))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_files_grow_by_less_than_the_limit(subsampling: str) -> None:
    content = jpeg(375, 500, subsampling)
    found = with_restarts(content)
    assert found is not None
    assert len(found[0]) <= (1 + MAX_GROWTH) * len(content)
    assert read_header(found[0]).restart_interval < read_header(content).mcus_per_row


def test_a_table_without_the_code_that_a_segment_needs_is_replaced() -> None:
    """A plane of slowly changing brightness, whose optimised table has codes for small differences alone."""
    ramp = np.repeat(np.arange(240, 256, dtype=np.uint8), 32)[None].repeat(64, axis=0)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=95, optimize=True)
    found = rewritten(file.getvalue(), 8)
    assert found is not None
    np.testing.assert_array_equal(decode(found[0], 1), decode(file.getvalue(), 1))


def test_other_files_are_left_alone(zoo: list) -> None:
    contents = {animal.name: animal.content for animal in zoo}
    for name in ("progressive.jpg", "cmyk.jpg", "colour.PNG", "truncated.jpg", "flipped.jpg", "empty.jpg"):
        assert with_restarts(contents[name]) is None, name
    whole = jpeg(375, 500)
    assert with_restarts(whole[:-2]) is None
    assert with_restarts(whole[: len(whole) // 2] + b"\xff\xd9") is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_left_alone_or_makes_a_file_of_equal_pixels(data: st.DataObject) -> None:
    content = bytearray(jpeg(70, 90, data.draw(st.sampled_from(SUBSAMPLINGS))))
    for place in data.draw(st.lists(st.integers(2, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = bytes(content)
    try:
        header = inspect(damaged, 1_000_000)
        pixels = decode(damaged, header.channels, header.orientation)
    except ValueError:
        with_restarts(damaged)
        return
    stored = encode(damaged, header, pixels, EncodeConfig())
    np.testing.assert_array_equal(decode(stored.content, header.channels, stored.orientation), pixels)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_crafted_offsets_are_refused(data: st.DataObject) -> None:
    found = rewritten(jpeg(70, 130), 3)
    assert found is not None
    content, offsets = found[0], found[1].copy()
    number = st.integers(-(2**31), 2**31 - 1) | st.sampled_from(offsets.tolist())
    for place in data.draw(st.lists(st.integers(0, len(offsets) - 1), max_size=4)):
        offsets[place] = data.draw(number)
    count = data.draw(st.integers(1, len(offsets)))
    offsets = offsets[:count] if data.draw(st.booleans()) else offsets
    if np.array_equal(offsets, found[1]):
        return
    with pytest.raises(ValueError, match="offsets are not those of this JPEG"):
        decode_box(content, offsets, (0, 0, 70, 130), 3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_sliceable_files_are_refused_or_decoded_and_nothing_else(data: st.DataObject) -> None:
    found = rewritten(jpeg(70, 130), 3)
    assert found is not None
    content = bytearray(found[0])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        pixels, (top, left) = decode_box(bytes(content), found[1], (20, 30, 40, 50), 3)
    except ValueError:
        return
    assert pixels[top : top + 40, left : left + 50].shape == (40, 50, 3)


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 71, 5), (60, 0, 11, 5), (0, 0, 5, 131)]
)
def test_a_box_outside_the_image_is_refused(box: tuple[int, int, int, int]) -> None:
    found = rewritten(jpeg(70, 130), 3)
    assert found is not None
    with pytest.raises(ValueError, match="is not within the image"):
        decode_box(*found, box, 3)


def test_a_file_without_restart_markers_is_not_sliced() -> None:
    with pytest.raises(ValueError, match="without restart markers that divide its rows cannot be sliced"):
        decode_box(jpeg(70, 130), np.array([0, 9], np.int32), (0, 0, 5, 5), 3)


@pytest.mark.parametrize("kind", ["restarts", "keep", "shrink"])
def test_what_is_stored_of_every_kind_of_image(zoo: list, kind) -> None:
    config = EncodeConfig(kind=kind, short_side_px=24)
    none = np.zeros(0, np.int32)
    for animal in (a for a in zoo if not a.reason):
        header = inspect(animal.content)
        pixels = decode(animal.content, header.channels, header.orientation)
        stored = encode(animal.content, header, pixels, config)
        found = decode(stored.content, header.channels, stored.orientation)
        assert found.shape[:2] == (stored.height_px, stored.width_px), animal.name
        if kind == "keep":
            assert stored.content == animal.content
        if kind == "shrink" and min(pixels.shape[:2]) > 24:
            assert min(found.shape[:2]) == 24
            assert stored.orientation == 1
        else:
            np.testing.assert_array_equal(found, pixels)
        offsets = none if stored.segment_offsets is None else np.array(stored.segment_offsets, np.int32)
        box = (1, 2, 9, 11) if min(found.shape[:2]) > 12 else (0, 0, 1, 1)
        part, (top, left, height, width) = decode_crop(
            stored.content, header.channels, stored.orientation, offsets, box
        )
        expected = found[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        np.testing.assert_array_equal(part[top : top + height, left : left + width], expected, animal.name)


def test_what_shrink_stores_can_be_sliced() -> None:
    content = jpeg(375, 500)
    stored = encode(content, inspect(content), decode(content, 3), EncodeConfig(kind="shrink", short_side_px=240))
    assert (stored.height_px, stored.width_px) == (240, 320)
    assert stored.segment_offsets is not None
    assert len(stored.segment_offsets) == 15 * 5 + 1
    assert len(stored.content) < len(content) / 2
