"""The pixels under a crop, decoded from just the bytes under it: bit-identical to decoding all and cropping.

Either the file has an index of its tiles (`index.py`), or restart markers at an interval of MCUs that divides its rows
and the offset of every segment between them is known. What lies under the crop is a JPEG behind a header with its size.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from pipelines.images.decode import Box, ImageArray, Scratch, decode, decode_jpeg
from pipelines.images.jpeg import RST0, JpegHeader, read_header

Offsets = NDArray[np.int32]
INDEX_NAME = b"MAE1"
"""What the content of the header's part with the index begins with."""


def decode_crop(
    content: bytes | memoryview,
    channels: int,
    orientation: int,
    offsets: Offsets,
    box: Box,
    scratch: Scratch | None = None,
) -> tuple[ImageArray, Box]:
    """Upright pixels around the box (top, left, height, width), and the box within them.

    Only what lies under the box is decoded where `offsets` say where the index begins and ends, or where each segment
    starts and the file ends; all is without any, and of a turned image. With `scratch` the pixels may lie there.
    Raises ValueError where the image is damaged or the offsets are not its own.
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
        raise ValueError("damaged JPEG: its colours are not those of a JPEG that can be sliced")
    return pixels, (box[0] - top, box[1] - left, box[2], box[3])


def _cut_tiles(
    content: bytes | memoryview, offsets: Offsets, box: Box, scratch: Scratch
) -> tuple[ImageArray, tuple[int, int]]:
    """A JPEG of the tiles under the box, and the row and column that it begins at."""
    from pipelines.images.jpeg import kernels

    start, stop = offsets.tolist()
    checksum = start + kernels.INDEX_HEAD - 6
    if int.from_bytes(content[checksum : checksum + 4], "big") != zlib.crc32(content[checksum + 4 : stop]):
        raise ValueError("the index is not that of this JPEG")
    out, work = scratch.of("file", 2 * len(content) + 4096), scratch.of("work", len(content) + kernels.PADDING_BYTES)
    # A tile takes two bits at least, four numbers of eight bytes each here.
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
    """A JPEG of the segments under the box, and the row and column that it begins at."""
    header = read_header(content)
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1:
        raise ValueError(f"box {box} is not within the image")
    if top + height > header.height_px or left + width > header.width_px:
        raise ValueError(f"box {box} is not within the image of {header.width_px} x {header.height_px}")
    _check(content, header, offsets)
    # Smooth upsampling looks at the neighbouring sample of a subsampled plane.
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
    """Raises ValueError unless the offsets are strictly within the file and each follows the marker that it must."""
    interval = header.restart_interval
    if not interval or header.mcus_per_row % interval:
        raise ValueError("a JPEG without restart markers that divide its rows cannot be sliced")
    num_segments = header.mcu_rows * (header.mcus_per_row // interval)
    if len(offsets) != num_segments + 1 or offsets[0] != header.scan_at or offsets[-1] != len(content):
        raise ValueError("segment offsets are not those of this JPEG")
    if (offsets[1:] - offsets[:-1]).min() < 2 or content[-2:] != b"\xff\xd9":
        raise ValueError("segment offsets are not those of this JPEG")
    # Each offset is now within the file, since they rise from the first to the last.
    stored, ends = np.frombuffer(content, np.uint8), offsets[1:-1]
    expected = RST0 + (np.arange(num_segments - 1) & 7)
    if (stored[ends - 2] != 0xFF).any() or (stored[ends - 1] != expected).any():
        raise ValueError("segment offsets are not those of this JPEG")


def _cut(content: bytes, header: JpegHeader, offsets: Offsets, rows: range, tiles: range) -> bytearray:
    """A JPEG of those segments alone."""
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
    # Where each segment's end, a marker of two bytes, has come to lie.
    shift = header.scan_at + np.cumsum(stops[:, -1] - starts) - stops[:, -1]
    ends = (stops + shift[:, None]).reshape(-1)
    view = np.frombuffer(file, np.uint8)
    view[ends - 1] = RST0 + (np.arange(len(ends)) & 7)
    file[-1] = 0xD9
    return file
