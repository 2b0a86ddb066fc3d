"""Crop, resize and mirror decoded pixels, or values, directly into the batch.

The arithmetic is integer, so that a sample's pixels are equal on every machine of a cluster, whatever its processors.
It is also closer to Pillow's than torch's, whose uint8 kernel has weights of fewer bits.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.images.crops.kernel import LINES, PIXEL, crop, padded
from pipelines.images.crops.value_kernel import GROUP, crop_plane, undo_filter, weigh_values
from pipelines.images.decode import Box, ImageArray, Scratch
from pipelines.images.decode import stored as stored_values

_UNSIGNED: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def crop_into(out: ImageArray, pixels: ImageArray, box: Box, flip: bool, scratch: Scratch) -> None:
    """Resize the box (top, left, height, width) of `pixels` (bicubic, antialiased) into `out`; mirror it with `flip`.

    Both arrays are [height width channels]. Raises ValueError for a box that is not within the pixels.
    """
    top, left, height, width = box
    image_height, image_width, channels = pixels.shape
    if min(top, left) < 0 or min(height, width) < 1 or top + height > image_height or left + width > image_width:
        raise ValueError(f"box {box} is not within the image of {image_height} x {image_width}")
    assert out.flags.c_contiguous
    assert out.shape[2] == channels in (1, 3)
    if not (pixels.flags.c_contiguous and pixels.flags.writeable):
        # Pillow's arrays are read-only, for which numba would compile another specialisation.
        pixels, top, left = pixels[top : top + height, left : left + width].copy(), 0, 0
    out_height, out_width = out.shape[:2]
    num_across, num_down = _num_pairs(width, out_width, 0), _num_pairs(height, out_height, 1)
    summed_width = padded(out_width)
    room = (
        scratch.of("shares", 2 * max(out_width * num_across, out_height * num_down), np.float64),
        scratch.of("lines", LINES * PIXEL * (max(width, 2 * num_across) + 1), np.int32),
        scratch.of("between", PIXEL * summed_width * (max(height + 1, 2 * num_down) + LINES >> 1), np.int32),
        scratch.of("line", summed_width * channels + PIXEL),
    )
    across, down = _table(scratch, "across", out_width, num_across), _table(scratch, "down", out_height, num_down)
    crop(pixels, (top, left, height, width), flip, out, across, down, room)


def crop_values_into(
    out: NDArray[np.float32],
    content: bytes | memoryview,
    limits: tuple[NDArray[np.float64], NDArray[np.float64]],
    box: Box,
    flip: bool,
    scratch: Scratch,
) -> None:
    """Resize the box of stored values into `out` [height width channels], from 0 to 1; mirror it with `flip`.

    Values are brought to that scale first, by the low and high of each channel, as `mae_core.values.to_unit` does it. A
    single channel fills all. Only the bands under the box are decoded. Raises ValueError for damaged values, and for a
    box that is not within the image.
    """
    _, num_planes, image_height, image_width = stored_values.layout_of(content)
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > image_height or left + width > image_width:
        raise ValueError(f"box {box} is not within the image of {image_height} x {image_width}")
    out_height, out_width, channels = out.shape
    if num_planes not in (1, channels):
        raise ValueError(f"other pixels: {num_planes} channels, where {channels} are read")
    planes, first = planes_of(content, scratch, range(top, top + height))
    planes = planes[:, top - first : top - first + height, left : left + width]
    tables = []
    for purpose, size, out_size in (("down", height, out_height), ("across", width, out_width)):
        num_taps = min(size, 2 * _num_pairs(size, out_size, 0))
        firsts = scratch.of(f"value {purpose} firsts", out_size, np.int64)[:out_size]
        count = out_size * num_taps
        weights = scratch.of(f"value {purpose}", count, np.float64)[:count].reshape(out_size, num_taps)
        weigh_values(firsts, weights, size)
        tables.append((firsts, weights))
    lines = scratch.of("value lines", height * width, np.float32)[: height * width].reshape(height, width)
    between = scratch.of("value between", width * out_height, np.float32)[: width * out_height]
    group = scratch.of("value group", GROUP * width, np.float32)[: GROUP * width].reshape(GROUP, width)
    room = lines, group, between.reshape(width, out_height), scratch.of("value line", out_height, np.float32)
    low = limits[0].astype(np.float32)
    span = (limits[1] - limits[0]).astype(np.float32)
    span = np.where(span > 0, span, np.float32(np.inf))
    for plane in range(num_planes):
        number = plane if len(low) > 1 else 0
        numbers = (low[number], span[number])
        crop_plane(planes[plane], numbers, np.bool_(flip), tables[0], tables[1], room, out, plane)
    if num_planes < channels:
        out[:, :, 1:] = out[:, :, :1]


def planes_of(content: bytes | memoryview, scratch: Scratch, rows: range | None = None) -> tuple[NDArray[Any], int]:
    """Return the bands of stored values under these rows, or all, [channels rows width], and their first row.

    The array is one of the scratch's buffers. Raises ValueError for damage.
    """
    dtype, channels, height, width = stored_values.layout_of(content)
    size = np.dtype(dtype).itemsize
    bands = stored_values.bands_of(content, range(height) if rows is None else rows)
    start, stop = bands.rows[0].start, bands.rows[-1].stop
    count = channels * (stop - start) * width
    planes = scratch.of(f"planes {size}", count, _UNSIGNED[size])[:count].reshape(channels, stop - start, width)
    further = [
        stored_values.unpacked(part, channels * height * width).reshape(channels, height, width) if len(part) else 0
        for part in bands.further
    ]
    for band, part in zip(bands.rows, bands.lowest):
        shape = channels, len(band), width
        in_bytes = scratch.of("filtered", size * prod(shape))[: size * prod(shape)].reshape(size, *shape)
        in_bytes[0] = stored_values.unpacked(part, prod(shape)).reshape(shape)
        for byte, found in enumerate(further, 1):
            in_bytes[byte] = found if isinstance(found, int) else found[:, band.start : band.stop]
        undo_filter(in_bytes, band.start - start, planes)
    return planes.view(dtype), start


def _num_pairs(size: int, out_size: int, spare: int) -> int:
    """Return the number of weight pairs per output position, plus `spare` for rows, whose pairs start at even rows."""
    return -(-4 * max(size, out_size) // out_size) + 1 + spare >> 1


def _table(scratch: Scratch, purpose: str, out_size: int, num_pairs: int) -> NDArray[np.int32]:
    """Return an uninitialised table: for every output position, the first source position and the weights."""
    count = out_size * (1 + num_pairs)
    return scratch.of(purpose, count, np.int32)[:count].reshape(out_size, 1 + num_pairs)
