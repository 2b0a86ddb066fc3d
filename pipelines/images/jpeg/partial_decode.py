"""Decode the pixels under a crop from the bytes under it, bit-identical to decoding the entire image and cropping.

The file has either an index of its tiles (`index.py`), or restart markers with known offsets, whose interval divides a
row of MCUs. The tiles or segments under the crop become a JPEG with a header of their size.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from pipelines.images.decode import Box, ImageArray, Scratch, decode, decode_jpeg
from pipelines.images.jpeg import RST0, JpegHeader, read_header

Offsets = NDArray[np.int32]
INDEX_NAME = b"MAE1"
"""First bytes of the content of the index's header segment."""


def decode_crop(
    content: bytes | memoryview,
    channels: int,
    orientation: int,
    offsets: Offsets,
    box: Box,
    scratch: Scratch | None = None,
) -> tuple[ImageArray, Box]:
    """Return upright pixels around the box (top, left, height, width), and the box within them.

    Only the bytes under the box are decoded, if `offsets` holds the begin and end of the index, or the start of each
    segment and the length of the file. Without offsets, or if the image is to be rotated, all is decoded. With
    `scratch`, the result may be one of its buffers. Raises ValueError if the image is damaged or the offsets are not
    its own.
    """
    if orientation != 1 or not len(offsets):
        return decode(bytes(content), channels, orientation, scratch), box
    scratch = scratch or Scratch()
    start = int(offsets[0])
    if len(offsets) == 2 and content[start + 4 : start + 8] == INDEX_NAME:
        file, (top, left) = _cut_tiles(content, offsets, box, scratch)
    else:
        file, (top, left) = _cut_segments(bytes(content), offsets, box)
    pixels = decode_jpeg(file, channels, scratch)
    if pixels is None:
        raise ValueError("damaged JPEG: its colour space does not allow partial decoding")
    return pixels, (box[0] - top, box[1] - left, box[2], box[3])


def _cut_tiles(
    content: bytes | memoryview, offsets: Offsets, box: Box, scratch: Scratch
) -> tuple[ImageArray, tuple[int, int]]:
    """Return a JPEG of the tiles under the box, and its top row and left column in the image."""
    from pipelines.images.jpeg import kernels

    start, stop = offsets.tolist()
    checksum = start + kernels.INDEX_HEAD - 6
    if int.from_bytes(content[checksum : checksum + 4], "big") != zlib.crc32(content[checksum + 4 : stop]):
        raise ValueError("the index is not that of this JPEG")
    out, work = scratch.of("file", 2 * len(content) + 4096), scratch.of("work", len(content) + kernels.PADDING_BYTES)
    # A tile takes at least two bits in the index, and four int64 here.
    tiles = scratch.of("tiles", 4 * (4 * (stop - start) + 1), np.int64).reshape(-1, 4)
    facts = np.zeros(kernels.NUM_FACTS, np.int64)
    tables = np.zeros((kernels.NUM_TABLES, kernels.TABLE_ROW), np.int32)
    length = kernels.cut(np.frombuffer(content, np.uint8), start, box, facts, tables, tiles, work, out)
    height, width, top, left = facts[kernels.HEIGHT : kernels.LEFT + 1].tolist()
    if length == kernels.OUTSIDE:
        raise ValueError(f"box {box} is not within the image of {width} x {height}")
    if length == kernels.DAMAGED:
        raise ValueError("damaged JPEG: the tiles under the box are not where its index says")
    return out[:length], (top, left)


def _cut_segments(content: bytes, offsets: Offsets, box: Box) -> tuple[bytearray, tuple[int, int]]:
    """Return a JPEG of the segments under the box, and its top row and left column in the image."""
    header = read_header(content)
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1:
        raise ValueError(f"box {box} is not within the image")
    if top + height > header.height_px or left + width > header.width_px:
        raise ValueError(f"box {box} is not within the image of {header.width_px} x {header.height_px}")
    _check(content, header, offsets)
    # Smooth upsampling reads the neighbouring samples of a subsampled component.
    margin = 2 if header.is_subsampled else 0
    tile_width = header.mcu_width_px * header.restart_interval
    first_row, last_row = _span(top, height, margin, header.mcu_height_px, header.mcu_rows)
    tiles_per_row = header.mcus_per_row // header.restart_interval
    first_tile, last_tile = _span(left, width, margin, tile_width, tiles_per_row)
    file = _cut(content, header, offsets, range(first_row, last_row), range(first_tile, last_tile))
    return file, (first_row * header.mcu_height_px, first_tile * tile_width)


def _span(start: int, size: int, margin: int, unit: int, count: int) -> tuple[int, int]:
    return max(0, start - margin) // unit, min(count, -(-(start + size + margin) // unit))


def _check(content: bytes, header: JpegHeader, offsets: Offsets) -> None:
    """Raise ValueError unless the offsets lie within the file and each follows the expected marker."""
    interval = header.restart_interval
    if not interval or header.mcus_per_row % interval:
        raise ValueError("a JPEG without restart markers that divide its rows cannot be decoded in part")
    num_segments = header.mcu_rows * (header.mcus_per_row // interval)
    if len(offsets) != num_segments + 1 or offsets[0] != header.scan_at or offsets[-1] != len(content):
        raise ValueError("segment offsets are not those of this JPEG")
    if (offsets[1:] - offsets[:-1]).min() < 2 or content[-2:] != b"\xff\xd9":
        raise ValueError("segment offsets are not those of this JPEG")
    # Every offset is within the file, because they increase from the first to the last.
    stored, ends = np.frombuffer(content, np.uint8), offsets[1:-1]
    expected = RST0 + (np.arange(num_segments - 1) & 7)
    if (stored[ends - 2] != 0xFF).any() or (stored[ends - 1] != expected).any():
        raise ValueError("segment offsets are not those of this JPEG")


def _cut(content: bytes, header: JpegHeader, offsets: Offsets, rows: range, tiles: range) -> bytearray:
    """Return a JPEG of those segments alone."""
    tiles_per_row = header.mcus_per_row // header.restart_interval
    tile_width = header.mcu_width_px * header.restart_interval
    height_px = min(header.height_px, rows.stop * header.mcu_height_px) - rows.start * header.mcu_height_px
    width_px = min(header.width_px, tiles.stop * tile_width) - tiles.start * tile_width
    starts = offsets[:-1].reshape(-1, tiles_per_row)[rows.start : rows.stop, tiles.start]
    stops = offsets[1:].reshape(-1, tiles_per_row)[rows.start : rows.stop, tiles.start : tiles.stop]
    parts = [content[: header.size_at], height_px.to_bytes(2, "big"), width_px.to_bytes(2, "big")]
    parts.append(content[header.size_at + 4 : header.scan_at])
    parts += [content[start:stop] for start, stop in zip(starts.tolist(), stops[:, -1].tolist())]
    file = bytearray().join(parts)
    # New position of each segment's end, a marker of two bytes.
    shift = header.scan_at + np.cumsum(stops[:, -1] - starts) - stops[:, -1]
    ends = (stops + shift[:, None]).reshape(-1)
    view = np.frombuffer(file, np.uint8)
    view[ends - 1] = RST0 + (np.arange(len(ends)) & 7)
    file[-1] = 0xD9
    return file
