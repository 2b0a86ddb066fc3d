"""The pixels under a crop, decoded from just the bytes under it: bit-identical to decoding all and cropping.

The file has restart markers, an interval of MCUs that divides its rows of MCUs, and the offset of every segment
between them is known. The segments under the crop, renumbered, behind a header with their size, are a JPEG.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipelines.decode import Box, Pixels, decode
from pipelines.jpeg import RST0, JpegHeader, read_header

Offsets = NDArray[np.int32]


def decode_crop(
    content: bytes, channels: int, orientation: int, segment_offsets: Offsets, box: Box
) -> tuple[Pixels, Box]:
    """Upright pixels around the box (top, left, height, width), and the box within them.

    With the offsets of a JPEG's segments only those under the box are decoded; without any, or for a turned image,
    all is. Raises ValueError where the image is damaged or the offsets are not its own.
    """
    if orientation != 1 or not len(segment_offsets):
        return decode(content, channels, orientation), box
    pixels, (top, left) = decode_box(content, segment_offsets, box, channels)
    return pixels, (top, left, box[2], box[3])


def decode_box(content: bytes, offsets: Offsets, box: Box, channels: int) -> tuple[Pixels, tuple[int, int]]:
    """Pixels around the box (top, left, height, width) of the stored image, and where in them the box begins.

    `offsets` are where each segment starts, and the length of the file. Raises ValueError where they are not those of
    this file, where it is damaged, and where the box is not within the image.
    """
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
    try:
        pixels = simplejpeg.decode_jpeg(file, colorspace="GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        raise ValueError(f"damaged JPEG: {error}") from None
    return pixels, (top - first_row * header.mcu_height_px, left - first_tile * tile_width)


def find_segments(content: bytes, header: JpegHeader) -> Offsets:
    """The offsets of all segments of a file with restart markers that ends with its scan, and its length."""
    stored = np.frombuffer(content, np.uint8, offset=header.scan_at)
    places = np.flatnonzero(stored[:-1] == 0xFF)
    markers = places[stored[places + 1] & 0xF8 == RST0]
    return np.concatenate([[header.scan_at], header.scan_at + markers + 2, [len(content)]]).astype(np.int32)


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
