"""Crop, resize and mirror decoded pixels directly into the batch.

The arithmetic is integer, so that a sample's pixels are equal on every machine of a cluster, whatever its processors.
It is also closer to Pillow's than torch's, whose uint8 kernel has weights of fewer bits.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.images.crops.kernel import LINES, PIXEL, crop, padded
from pipelines.images.decode import Box, ImageArray, Scratch


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


def _num_pairs(size: int, out_size: int, spare: int) -> int:
    """Return the number of weight pairs per output position, plus `spare` for rows, whose pairs start at even rows."""
    return -(-4 * max(size, out_size) // out_size) + 1 + spare >> 1


def _table(scratch: Scratch, purpose: str, out_size: int, num_pairs: int) -> NDArray[np.int32]:
    """Return an uninitialised table: for every output position, the first source position and the weights."""
    count = out_size * (1 + num_pairs)
    return scratch.of(purpose, count, np.int32)[:count].reshape(out_size, 1 + num_pairs)
