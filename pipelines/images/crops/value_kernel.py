"""Antialiased bicubic resizing of values in float32, as `kernel` does it for bytes, with vertical sums first.

1. The box's values are brought to 0 to 1, once each.
2. Vertical sums of whole lines give one line per output row. It is stored across, so that
3. horizontal sums, too, run over neighbouring elements.

Sums are in a fixed order and without fused operations, so that results are equal on all machines. Inner loops index by
their own variable alone: for any other index, numba checks whether it is negative, and LLVM cannot vectorise.
"""

import numpy as np

from pipelines.images.crops.kernel import _cubic
from pipelines.images.crops.vectors import compiled

GROUP = 16
"""Number of lines that are summed before they are stored across."""


@compiled
def undo_filter(in_bytes, first, out):
    """Restore unsigned values in rows from `first` of `out` [channels height width].

    `in_bytes` [bytes of a value, channels, rows, width] holds folded differences from the row above, as `decode.stored`
    writes them.
    """
    size, channels, rows, width = in_bytes.shape
    for channel in range(channels):
        for row in range(rows):
            at = first + row
            if size == 1:
                for x in range(width):
                    folded = in_bytes[0, channel, row, x]
                    out[channel, at, x] = folded >> 1 ^ -(folded & 1)
            elif size == 2:
                for x in range(width):
                    folded = in_bytes[0, channel, row, x] | np.uint16(in_bytes[1, channel, row, x]) << 8
                    out[channel, at, x] = folded >> 1 ^ -(folded & 1)
            else:
                for x in range(width):
                    low = in_bytes[0, channel, row, x] | np.uint32(in_bytes[1, channel, row, x]) << 8
                    high = in_bytes[2, channel, row, x] | np.uint32(in_bytes[3, channel, row, x]) << 8
                    folded = low | high << 16
                    out[channel, at, x] = folded >> 1 ^ -(folded & 1)
            if row:
                above = at - 1
                for x in range(width):
                    out[channel, at, x] += out[channel, above, x]


@compiled
def weigh_values(firsts, weights, size):
    """Fill, for every output position, its first source position and its float32 weights, which sum to one."""
    out_size, num_taps = weights.shape
    scale = size / out_size
    narrow = min(1 / scale, 1.0)
    reach = 2 / narrow
    last = max(0, size - num_taps)
    for place in range(out_size):
        center = (place + 0.5) * scale
        first = max(0, int(center - reach + 0.5))
        begin = min(first, last)
        firsts[place] = begin
        stop = min(min(size, int(center + reach + 0.5)), begin + num_taps)
        total = 0.0
        for tap in range(num_taps):
            share = _cubic((begin + tap + 0.5 - center) * narrow) if first <= begin + tap < stop else 0.0
            weights[place, tap] = share
            total += share
        for tap in range(num_taps):
            weights[place, tap] /= total


@compiled
def crop_plane(plane, limits, mirrored, down, across, room, out, channel):
    """Resize a plane [height width], which is the box alone, into one channel of `out` [height width channels].

    `limits` are the value that becomes 0, and the span from it to 1. `room` holds buffers for the values from 0 to 1
    [height width], for GROUP lines [GROUP width], for the lines in between [width, out height], and for a line.
    """
    height, width = plane.shape
    low, span = limits
    down_firsts, down_weights = down
    across_firsts, across_weights = across
    lines, group, between, line = room
    out_height, out_width = out.shape[0], out.shape[1]
    zero, one = np.float32(0), np.float32(1)
    for row in range(height):
        for x in range(width):
            value = (np.float32(plane[row, x]) - low) / span
            value = value if value > zero else zero
            lines[row, x] = value if value < one else one
    for start in range(0, out_height, GROUP):
        stop = min(start + GROUP, out_height)
        for row in range(start, stop):
            summed = row - start
            for x in range(width):
                group[summed, x] = zero
            for tap in range(down_weights.shape[1]):
                weight = np.float32(down_weights[row, tap])
                source = down_firsts[row] + tap
                if weight != zero:
                    for x in range(width):
                        group[summed, x] += weight * lines[source, x]
        # Several rows at a time, so that neighbours in memory are written together.
        for x in range(width):
            for summed in range(stop - start):
                between[x, start + summed] = group[summed, x]
    for place in range(out_width):
        for row in range(out_height):
            line[row] = zero
        for tap in range(across_weights.shape[1]):
            weight = np.float32(across_weights[place, tap])
            source = across_firsts[place] + tap
            if weight != zero:
                for row in range(out_height):
                    line[row] += weight * between[source, row]
        column = out_width - 1 - place if mirrored else place
        for row in range(out_height):
            value = line[row] if line[row] > zero else zero
            out[row, column, channel] = value if value < one else one
