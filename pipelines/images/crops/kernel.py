"""Antialiased bicubic resizing as in Pillow (Keys 1981, a = -0.5), horizontal pass first, in integer arithmetic.

Four source lines at a time: their weighted sums become bytes, and bytes of two lines are packed into pairs. The
weighted sums of pairs then give a line of the result. Indices are not checked here; `crops` allocates enough space for
all.
"""

import numpy as np

from pipelines.images.crops.vectors import compiled, eight, plus_products, store_pairs, store_pixels, to_bytes, widen

LINES = 4
"""Number of source lines processed together."""
PIXEL = 4
"""Values stored per pixel; those beyond its channels are undefined."""
# Largest precision for which sums of products fit in 32 bits, and largest weight, with its rounding, in 16 bits.
_MOST_BITS, _MOST_WEIGHT = 21, 32_000
# Order of the lines in a register, so that lines 0 and 2 are paired with lines 1 and 3.
_ORDER = (0, 2, 1, 3)
# Numba would compile a specialisation for each literal True and False.
_NO, _YES = np.bool_(False), np.bool_(True)


@compiled
def padded(width):
    """Round the width up to a multiple of 8, the number of output pixels summed together."""
    return width + 7 & ~7


@compiled
def crop(pixels, box, mirrored, out, across, down, room):
    """Resize the box (top, left, height, width) of the pixels into `out`, mirrored if asked.

    `across` and `down` are buffers for the tables that `_weigh` fills, one row per output position. `room` holds
    buffers for the weights' shares, the source lines in work, the intermediate lines, and one output line.
    """
    top, left, height, width = box
    shares, lines, between, line = room
    across_bits = _weigh(across, shares, width, _NO, mirrored)
    down_bits = _weigh(down, shares, height, _YES, _NO)
    channels = out.shape[2]
    stride = pixels.shape[1] * channels
    source = pixels.reshape(-1), top * stride + left * channels, stride
    room = lines, between, line
    _resize(source, height, width, channels, across, across_bits, down, down_bits, room, out.reshape(-1))


@compiled
def _weigh(table, shares, size, aligned, mirrored):
    """Fill the table with weights; return their precision in bits.

    Each row gets its first position in a source of `size`, then pairs of weights that sum to one. `shares` is a buffer
    for twice as many numbers. With `aligned`, first positions are even.
    """
    out_size, num_taps = table.shape[0], 2 * (table.shape[1] - 1)
    scale = size / out_size
    narrow = min(1 / scale, 1.0)
    reach = 2 / narrow
    last_begin = max(0, (size + (size & 1) if aligned else size) - num_taps)
    greatest = 0.0
    for place in range(out_size):
        center = (place + 0.5) * scale
        first = max(0, int(center - reach + 0.5))
        begin = min(first & ~1 if aligned else first, last_begin)
        table[place, 0] = begin
        stop = min(min(size, int(center + reach + 0.5)), begin + num_taps)
        total = 0.0
        for tap in range(num_taps):
            share = _cubic((begin + tap + 0.5 - center) * narrow) if first <= begin + tap < stop else 0.0
            shares[place * num_taps + tap] = share
            total += share
        for tap in range(num_taps):
            shares[place * num_taps + tap] /= total
            greatest = max(greatest, shares[place * num_taps + tap])
    bits = 1
    while bits < _MOST_BITS and greatest * (2 << bits) < _MOST_WEIGHT:
        bits += 1
    for place in range(out_size):
        _round(table, shares, place, num_taps, bits)
    if mirrored:
        _mirror(table)
    return bits


@compiled
def _cubic(distance):
    distance = min(abs(distance), 2.0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return near if distance < 1 else far


@compiled
def _round(table, shares, place, num_taps, bits):
    """Round the weights to integers; the largest one absorbs the rounding error of the others."""
    start = place * num_taps
    left, greatest = float(1 << bits), start
    for tap in range(start, start + num_taps):
        shares[tap] = np.rint(shares[tap] * (1 << bits))
        left -= shares[tap]
        if shares[tap] > shares[greatest]:
            greatest = tap
    shares[greatest] += left
    for pair in range(num_taps >> 1):
        tap = start + 2 * pair
        table[place, 1 + pair] = np.int32(shares[tap]) & 0xFFFF | np.int32(shares[tap + 1]) << 16


@compiled
def _mirror(table):
    for place in range(table.shape[0] >> 1):
        other = table.shape[0] - 1 - place
        for i in range(table.shape[1]):
            table[place, i], table[other, i] = table[other, i], table[place, i]


@compiled
def _resize(source, height, width, channels, across, across_bits, down, down_bits, room, out):
    """Resize to `out`, lines of bytes without padding.

    `source` is the image's bytes, the offset of the box in them, and the bytes per line.
    """
    data, start, stride = source
    lines, between, line = room
    pitch, line_bytes = PIXEL * padded(across.shape[0]), across.shape[0] * channels
    num_pairs, done = down.shape[1] - 1, 0
    half = eight(np.int32(1 << down_bits >> 1))
    shift = eight(np.int32(down_bits))
    for row in range(down.shape[0]):
        while done < down[row, 0] + 2 * num_pairs:
            for i in range(LINES):
                at = start + min(done + i, height - 1) * stride
                _pair_neighbours(data, at, width, channels, lines, PIXEL * _ORDER[i])
            _sum_across(lines, across, across_bits, between, (done >> 1) * pitch, pitch)
            done += LINES
        first = (down[row, 0] >> 1) * pitch
        for x in range(0, pitch, 32):
            a, b, c, d, at = half, half, half, half, first + x
            for pair in range(num_pairs):
                weight = eight(down[row, 1 + pair])
                a = plus_products(a, between, at, weight)
                b = plus_products(b, between, at + 8, weight)
                c = plus_products(c, between, at + 16, weight)
                d = plus_products(d, between, at + 24, weight)
                at += pitch
            place = (x >> 2) * channels
            store_pixels(line, place, place + channels, to_bytes(a, shift))
            store_pixels(line, place + 2 * channels, place + 3 * channels, to_bytes(b, shift))
            store_pixels(line, place + 4 * channels, place + 5 * channels, to_bytes(c, shift))
            store_pixels(line, place + 6 * channels, place + 7 * channels, to_bytes(d, shift))
        for i in range(line_bytes):
            out[row * line_bytes + i] = line[i]


@compiled
def _pair_neighbours(source, start, width, channels, lines, place):
    """Pack each pixel of a line with the next one, channel by channel."""
    quick = max(width - 2, 0) if channels == 3 else 0
    for x in range(quick):
        widen(source, start + 3 * x, lines, LINES * PIXEL * x + place)
    for x in range(quick, width):
        at = start + x * channels
        for channel in range(channels):
            following = source[at + channels + channel] if x + 1 < width else 0
            lines[LINES * PIXEL * x + place + channel] = np.int32(source[at + channel]) | np.int32(following) << 16


@compiled
def _sum_across(lines, across, across_bits, between, start, pitch):
    """Reduce the weighted sums of LINES lines to bytes, and pack the bytes of each two lines into pairs."""
    half = eight(np.int32(1 << across_bits >> 1))
    shift = eight(np.int32(across_bits))
    for x in range(across.shape[0]):
        odd, even, at = half, half, LINES * PIXEL * across[x, 0]
        for pair in range(across.shape[1] - 1):
            weight = eight(across[x, 1 + pair])
            odd = plus_products(odd, lines, at, weight)
            even = plus_products(even, lines, at + 8, weight)
            at += 2 * LINES * PIXEL
        place = start + PIXEL * x
        store_pairs(between, place, place + pitch, to_bytes(odd, shift), to_bytes(even, shift))
