"""An index or restart markers change no pixel, slices are what decoding all gives, and what is crafted is refused."""

import io
import zlib
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.images.decode import Scratch, decode, inspect
from pipelines.images.encode import encode
from pipelines.images.jpeg import read_header
from pipelines.images.jpeg.huffman import Huffman, completed, read_tables
from pipelines.images.jpeg.index import indexed, with_index
from pipelines.images.jpeg.partial_decode import decode_crop
from pipelines.images.jpeg.restarts import MAX_GROWTH, rewritten, with_restarts
from pipelines.images.jpeg.scan import read_scan

KINDS = ("indexed", "restarts")
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


def sliceable(content: bytes, kind: str, num_mcus: int) -> tuple[bytes, np.ndarray]:
    """With tiles of about so many MCUs, whatever the file grows by."""
    header = read_header(content)
    scan = read_scan(content, header)
    if kind == "indexed":
        found, span = indexed(content, header, scan, min(num_mcus, header.mcus_per_row))
        return found, np.array(span, np.int32)
    dividing = max(k for k in range(1, num_mcus + 1) if header.mcus_per_row % k == 0)
    return rewritten(content, header, scan, dividing)


def decode_box(found: tuple[bytes, np.ndarray], box: tuple[int, int, int, int], channels: int) -> np.ndarray:
    """Return the box's pixels by a partial decode."""
    pixels, (top, left, height, width) = decode_crop(found[0], channels, 1, found[1], box, Scratch())
    return pixels[top : top + height, left : left + width]


@settings(max_examples=150, deadline=None)
@given(content=images, kind=st.sampled_from(KINDS), num_mcus=st.integers(1, 20), data=st.data())
def test_a_slice_of_any_file_is_what_decoding_all_gives(
    content: bytes, kind: str, num_mcus: int, data: st.DataObject
) -> None:
    header = read_header(content)
    found = sliceable(content, kind, num_mcus)
    channels = data.draw(st.sampled_from([1, 3]))
    expected = decode(content, channels)
    np.testing.assert_array_equal(decode(found[0], channels), expected)
    for _ in range(4):
        height = data.draw(st.integers(1, header.height_px))
        width = data.draw(st.integers(1, header.width_px))
        top = data.draw(st.integers(0, header.height_px - height))
        left = data.draw(st.integers(0, header.width_px - width))
        crop = expected[top : top + height, left : left + width]
        np.testing.assert_array_equal(decode_box(found, (top, left, height, width), channels), crop)


def find_segments(content: bytes) -> np.ndarray:
    """Where the segments of a file that ends with its scan begin, and its length, by its markers."""
    start = read_header(content).scan_at
    markers = [at for at in range(start, len(content) - 1) if content[at] == 0xFF and content[at + 1] & 0xF8 == 0xD0]
    return np.array([start, *(at + 2 for at in markers), len(content)])


@settings(max_examples=25, deadline=None)
@given(content=images, first=st.integers(1, 9), second=st.integers(1, 9), kind=st.sampled_from(KINDS))
def test_files_that_have_restart_markers_are_sliceable_too(content: bytes, first: int, second: int, kind: str) -> None:
    marked = sliceable(content, "restarts", first)[0]
    if kind == "restarts":
        again = sliceable(marked, kind, second)
        np.testing.assert_array_equal(again[1], find_segments(again[0]))
        assert again[0] == sliceable(content, kind, second)[0]
    else:
        plain = with_index(marked)
        if plain is not None:
            assert not read_header(plain[0]).restart_interval
            np.testing.assert_array_equal(decode(plain[0], 3), decode(content, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_files_grow_by_less_than_the_limit_and_are_the_same_each_time(subsampling: str, kind: str) -> None:
    content = jpeg(375, 500, subsampling)
    transcode = with_index if kind == "indexed" else with_restarts
    found = transcode(content)
    assert found is not None
    assert len(found[0]) <= (1 + MAX_GROWTH) * len(content)
    again = transcode(content)
    assert again is not None
    assert (again[0], list(again[1])) == (found[0], list(found[1]))
    header = read_header(content)
    left = decode_crop(found[0], 3, 1, np.array(found[1], np.int32), (0, 0, 8, 8))[0]
    assert left.shape[1] < header.width_px


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_the_code_that_a_segment_needs_is_completed(kind: str) -> None:
    """A plane of slowly changing brightness, whose optimised table has codes for small differences alone."""
    ramp = np.repeat(np.arange(240, 256, dtype=np.uint8), 32)[None].repeat(64, axis=0)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=95, optimize=True)
    content = file.getvalue()
    assert len(read_tables(content, read_header(content).parts)[0].symbols) < 12
    found = sliceable(content, kind, 8)
    np.testing.assert_array_equal(decode(found[0], 1), decode(content, 1))
    np.testing.assert_array_equal(decode_box(found, (24, 300, 30, 100), 1), decode(content, 1)[24:54, 300:400])


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), symbols=st.permutations(range(12)))
def test_a_completed_table_has_every_size_and_its_old_codes(lengths: list[int], symbols: list[int]) -> None:
    lengths = sorted(lengths)
    if sum(2.0**-length for length in lengths) + 2.0**-16 > 1 - 2.0 ** -max(lengths) / 2:
        return
    counts = bytes(lengths.count(length) for length in range(1, 17))
    table = Huffman(counts, bytes(symbols[: len(lengths)]))
    found = completed(table)
    assert sorted(found.symbols) == list(range(12))
    codes, more = codes_of(table), codes_of(found)
    assert {symbol: more[symbol] for symbol in codes} == codes
    assert all(not a.startswith(b) for a in more.values() for b in more.values() if a is not b)
    assert all("0" in code for code in more.values())


def codes_of(table: Huffman) -> dict[int, str]:
    """Codes as strings of bits, by symbol (T.81, annex C)."""
    found, code, place = {}, 0, 0
    for length, count in enumerate(table.counts, start=1):
        for symbol in table.symbols[place : place + count]:
            found[symbol] = f"{code:0{length}b}"
            code += 1
        place, code = place + count, code << 1
    return found


def test_a_table_without_room_is_left_alone() -> None:
    full = Huffman(bytes([1] * 15 + [2]), bytes(range(17)))
    with pytest.raises(ValueError, match="without room"):
        completed(full._replace(symbols=bytes(range(12, 29))))


@pytest.mark.parametrize("transcode", [with_index, with_restarts])
def test_other_files_are_left_alone(zoo: list, transcode) -> None:
    contents = {animal.name: animal.content for animal in zoo}
    for name in ("progressive.jpg", "cmyk.jpg", "colour.PNG", "truncated.jpg", "flipped.jpg", "empty.jpg"):
        assert transcode(contents[name]) is None, name
    whole = jpeg(375, 500)
    assert transcode(whole[:-2]) is None
    assert transcode(whole[: len(whole) // 2] + b"\xff\xd9") is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_left_alone_or_makes_a_file_of_equal_pixels(data: st.DataObject) -> None:
    content = bytearray(jpeg(70, 90, data.draw(st.sampled_from(SUBSAMPLINGS))))
    for place in data.draw(st.lists(st.integers(2, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = bytes(content)
    kind = data.draw(st.sampled_from(KINDS))
    try:
        header = inspect(damaged, 1_000_000)
        pixels = decode(damaged, header.channels, header.orientation)
    except ValueError:
        with_index(damaged)
        with_restarts(damaged)
        return
    stored = encode(damaged, header, pixels, EncodeConfig(kind=kind))
    np.testing.assert_array_equal(decode(stored.content, header.channels, stored.orientation), pixels)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_crafted_offsets_are_refused(data: st.DataObject, kind: str) -> None:
    content, right = sliceable(jpeg(70, 130), kind, 3)
    offsets = right.copy()
    number = st.integers(-(2**31), 2**31 - 1) | st.sampled_from(offsets.tolist())
    for place in data.draw(st.lists(st.integers(0, len(offsets) - 1), max_size=4)):
        offsets[place] = data.draw(number)
    count = data.draw(st.integers(1, len(offsets)))
    offsets = offsets[:count] if data.draw(st.booleans()) else offsets
    if np.array_equal(offsets, right):
        return
    with pytest.raises(ValueError, match=r"not that|not those|without restart markers"):
        decode_box((content, offsets), (0, 0, 70, 130), 3)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_damaged_sliceable_files_are_refused_or_decoded_and_nothing_else(data: st.DataObject, kind: str) -> None:
    found, offsets = sliceable(jpeg(70, 130), kind, 3)
    content = bytearray(found)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_box((bytes(content), offsets), (20, 30, 40, 50), 3)
    except ValueError:
        return
    assert pixels.shape == (40, 50, 3)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_crafted_index_is_refused_or_decoded_and_nothing_else(data: st.DataObject) -> None:
    """Its checksum is right, so that its numbers are looked at."""
    content, span = sliceable(jpeg(70, 130, data.draw(st.sampled_from(SUBSAMPLINGS))), "indexed", 2)
    start, stop = span.tolist()
    body = bytearray(content[start + 12 : stop])
    for place in data.draw(st.lists(st.integers(0, 8) | st.integers(0, len(body) - 1), min_size=1, max_size=9)):
        body[place] = data.draw(st.integers(0, 255))
    crafted = content[: start + 8] + zlib.crc32(body).to_bytes(4, "big") + body + content[stop:]
    try:
        pixels = decode_box((crafted, span), (20, 30, 40, 50), 3)
    except ValueError:
        return
    assert pixels.shape == (40, 50, 3)


def test_a_damaged_index_is_refused() -> None:
    content, span = sliceable(jpeg(70, 130), "indexed", 2)
    for place in range(span[0] + 8, span[1]):
        damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        with pytest.raises(ValueError, match="not that of this JPEG"):
            decode_box((damaged, span), (20, 30, 40, 50), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 71, 5), (60, 0, 11, 5), (0, 0, 5, 131)]
)
def test_a_box_outside_the_image_is_refused(box: tuple[int, int, int, int], kind: str) -> None:
    with pytest.raises(ValueError, match="is not within the image"):
        decode_box(sliceable(jpeg(70, 130), kind, 3), box, 3)


def test_a_file_without_restart_markers_is_not_sliced() -> None:
    with pytest.raises(ValueError, match="without restart markers that divide its rows cannot be decoded in part"):
        decode_box((jpeg(70, 130), np.array([0, 9], np.int32)), (0, 0, 5, 5), 3)


def test_a_file_of_one_segment_is_sliced_by_it() -> None:
    """Its offsets are two numbers, as an index's."""
    content, offsets = sliceable(jpeg(8, 32, "4:4:4"), "restarts", 4)
    assert len(offsets) == 2
    np.testing.assert_array_equal(decode_box((content, offsets), (1, 2, 3, 4), 3), decode(content, 3)[1:4, 2:6])


@pytest.mark.parametrize("kind", ["indexed", "restarts", "keep", "shrink"])
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
    pixels = decode_crop(stored.content, 3, 1, np.array(stored.segment_offsets, np.int32), (0, 0, 8, 8))[0]
    assert pixels.shape[1] < 320
    assert len(stored.content) < len(content) / 2
