"""Crops of decoded pixels, resized and mirrored, straight into the batch that they belong to.

The arithmetic is of whole numbers, so that a sample's pixels are the same on every machine of a cluster, whatever
its processors; and closer to Pillow's than torch's, whose kernel for bytes takes weights of fewer bits.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipelines.crops.kernel import LINES, PIXEL, resize, weigh
from pipelines.decode import Box, Pixels, Scratch


def crop_into(out: Pixels, pixels: Pixels, box: Box, flip: bool, scratch: Scratch) -> None:
    """The box (top, left, height, width) of the pixels, resized (bicubic, antialiased) and mirrored where `flip`, is in
    `out`; both are [height width channels].

    Raises ValueError for a box that is not within the pixels.
    """
    top, left, height, width = box
    whole_height, whole_width, channels = pixels.shape
    if min(top, left) < 0 or min(height, width) < 1 or top + height > whole_height or left + width > whole_width:
        raise ValueError(f"box {box} is not within the image of {whole_height} x {whole_width}")
    assert out.flags.c_contiguous
    assert out.shape[2] == channels in (1, 3)
    if not (pixels.flags.c_contiguous and pixels.flags.writeable):
        # Pillow lends pixels that must not be written, of which numba would make a case of its own.
        pixels, top, left, whole_width = pixels[top : top + height, left : left + width].copy(), 0, 0, width
    out_height, out_width = out.shape[:2]
    down, down_bits = _weights(height, out_height, True, False, scratch)
    across, across_bits = _weights(width, out_width, False, flip, scratch)
    padded = out_width + 7 & ~7
    num_lines = max(height + 1, 2 * down.shape[1]) + LINES
    lines = _int32(scratch, "lines", LINES * PIXEL * (max(width, 2 * across.shape[1]) + 1))
    between = _int32(scratch, "between", PIXEL * padded * (num_lines >> 1))
    line = scratch.of("line", padded * channels + PIXEL)
    stride = whole_width * channels
    place = top * stride + left * channels, stride, height, width, channels
    weights = across, across_bits, down, down_bits
    resize(pixels.reshape(-1), *place, *weights, (lines, between, line), out.reshape(-1))


def _weights(size: int, out_size: int, is_height: bool, flip: bool, scratch: Scratch) -> tuple[NDArray[np.int32], int]:
    """The weights of every place of the result, and their bits."""
    # Lines are paired once, so that windows begin at even ones and may have to reach one further.
    num_pairs = ceil(4 * max(size / out_size, 1)) + 1 + is_height >> 1
    table = _int32(scratch, "down" if is_height else "across", out_size * (1 + num_pairs))
    table = table[: out_size * (1 + num_pairs)].reshape(out_size, 1 + num_pairs)
    shares = scratch.of("shares", 16 * out_size * num_pairs).view(np.float64)
    return table, weigh(table, shares, size, is_height, flip)


def _int32(scratch: Scratch, purpose: str, count: int) -> NDArray[np.int32]:
    return scratch.of(purpose, 4 * count).view(np.int32)
