"""Cut the tiles under a box out of a JPEG with an index, as a JPEG without restart markers."""

import numpy as np

from pipelines.images.jpeg.kernels.codes import (
    DAMAGED,
    EOI,
    PADDING_BYTES,
    SPARE_BYTES,
    block_end,
    close,
    copy,
    dc_code,
    put,
    read_dc,
    unstuff,
)
from pipelines.images.jpeg.kernels.head import (
    COMPONENTS,
    COUNT,
    HEIGHT,
    INDEX,
    INDEX_STOP,
    LEFT,
    MCU_HEIGHT,
    MCU_WIDTH,
    SIZE_AT,
    TILE_MCUS,
    TOP,
    WIDTH,
    read_head,
)
from pipelines.images.jpeg.kernels.words import U64, ZERO, bits_at, compiled, leading_ones

OUTSIDE = -2
MAX_QUOTIENT = 24
"""Largest quotient of a Rice code in the index."""
MAX_DC, _MAX_BITS = 1 << 15, 1 << 31


@compiled
def cut(data, index_at, box, facts, tables, tiles, work, out):
    """Write a JPEG of the tiles under the box to `out`; return its length, DAMAGED, or OUTSIDE for a bad box.

    `facts` and `tables` must be zeros; the facts are filled as `head.py` lists them. `tiles` is a buffer for the
    index's numbers.
    """
    if len(out) < 2 * len(data) + SPARE_BYTES or len(work) < len(data) + PADDING_BYTES:
        return DAMAGED
    scan_at, out_at = read_head(data, index_at, out, facts, tables)
    if scan_at == DAMAGED:
        return DAMAGED
    first_row, last_row, first, last, per_row = _tiles(facts, box)
    if last == 0:
        return OUTSIDE
    num_tiles = per_row * last_row
    if num_tiles >= len(tiles) or not read_index(data, facts, per_row, num_tiles, tiles):
        return DAMAGED
    if 8 * scan_at + tiles[num_tiles, 0] > 8 * (len(data) - 2):
        return DAMAGED
    row_px, tile_px = facts[MCU_HEIGHT], facts[MCU_WIDTH] * facts[TILE_MCUS]
    facts[TOP], facts[LEFT] = first_row * row_px, first * tile_px
    _write_size(out, facts[SIZE_AT], min(facts[HEIGHT], last_row * row_px) - facts[TOP])
    _write_size(out, facts[SIZE_AT] + 2, min(facts[WIDTH], last * tile_px) - facts[LEFT])
    waiting, num_waiting, last_end = U64(0), ZERO, ZERO
    for row in range(first_row, last_row):
        begin, end = row * per_row + first, row * per_row + last
        bits = 8 * scan_at + tiles[begin, 0], 8 * scan_at + tiles[end, 0]
        out_at, waiting, num_waiting = _strip(
            data, bits, facts, tables, tiles, begin, last_end, work, out, out_at, waiting, num_waiting
        )
        if out_at == DAMAGED:
            return DAMAGED
        last_end = end
    return close(out, out_at, waiting, num_waiting, EOI)


@compiled
def _tiles(facts, box):
    """Return first and last row, first and last tile in a row, and tiles per row of the box; zeros if it is outside."""
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1:
        return 0, 0, 0, 0, 0
    bottom, right = top + height, left + width
    if bottom > facts[HEIGHT] or right > facts[WIDTH]:
        return 0, 0, 0, 0, 0
    # Smooth upsampling reads the neighbouring samples of a subsampled component.
    margin = 2 if facts[MCU_HEIGHT] * facts[MCU_WIDTH] > 64 else 0
    row_px, tile_px = facts[MCU_HEIGHT], facts[MCU_WIDTH] * facts[TILE_MCUS]
    last_row = -(-min(facts[HEIGHT], bottom + margin) // row_px)
    last = -(-min(facts[WIDTH], right + margin) // tile_px)
    return (
        max(0, top - margin) // row_px,
        last_row,
        max(0, left - margin) // tile_px,
        last,
        -(-facts[WIDTH] // tile_px),
    )


@compiled
def _strip(data, bits, facts, tables, tiles, begin, last_end, work, out, out_at, waiting, num_waiting):
    """Append bits of one row of MCUs to the output.

    Each component's first DC code is relative to tile `begin`. It is rewritten relative to the previous strip, which
    ended at tile `last_end`.
    """
    damaged = DAMAGED, waiting, num_waiting
    if out_at + 2 * (bits[1] - bits[0] >> 3) + SPARE_BYTES > len(out):
        return damaged
    size = unstuff(data, bits[0] >> 3, bits[1] + 7 >> 3, work)
    if size == DAMAGED:
        return damaged
    at, stop = bits[0] & 7, 8 * size - (-bits[1] & 7)
    copied = at
    for i in range(facts[COUNT]):
        fact = COMPONENTS + 4 * i
        dc_row, ac_row = tables[facts[fact + 2]], tables[facts[fact + 3]]
        for block in range(facts[fact] * facts[fact + 1]):
            if at >= stop:
                return damaged
            taken, difference = read_dc(dc_row, bits_at(work, at))
            if block == 0:
                out_at, waiting, num_waiting = copy(work, copied, at, out, out_at, waiting, num_waiting)
                code, length = dc_code(dc_row, tiles[begin, i + 1] + difference - tiles[last_end, i + 1])
                if length == 0:
                    return damaged
                out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, code, length)
                copied = at + taken
            at = block_end(work, at + taken, stop, ac_row)
            if taken == 0 or at == DAMAGED:
                return damaged
    return copy(work, copied, stop, out, out_at, waiting, num_waiting)


@compiled
def read_index(data, facts, per_row, num_tiles, tiles):
    """Decode for every tile its first bit, relative to the scan, and the DC coefficients before it.

    Each number is a difference from the tile above, in the first row from the tile before. Returns False if the numbers
    end early or are out of range.
    """
    start, stop, num_fields = facts[INDEX], facts[INDEX_STOP], facts[COUNT] + 1
    if stop > len(data) - 8 or start + num_fields > stop:
        return False
    at, end = 8 * (start + num_fields), 8 * stop
    for field in range(num_fields):
        tiles[0, field] = 0
    for tile in range(num_tiles):
        for field in range(num_fields):
            if at >= end:
                return False
            word = bits_at(data, at)
            quotient = min(np.int64(leading_ones(word)), MAX_QUOTIENT)
            size = np.int64(data[start + field]) & 31
            word <<= U64(quotient + 1)
            rest = np.int64(word >> U64(1) >> U64(63 - size))
            at += quotient + 1 + size
            code = quotient << size | rest
            number = (code >> 1) ^ -(code & 1)
            before = tile - per_row if tile >= per_row else tile - 1
            if before >= 0:
                number += tiles[before + 1, field] - (tiles[before, field] if field == 0 else 0)
            if field == 0:
                if not 0 < number < _MAX_BITS:
                    return False
                number += tiles[tile, 0]
            elif abs(number) > MAX_DC:
                return False
            tiles[tile + 1, field] = number
    return at <= end


@compiled
def _write_size(out, at, number):
    out[at], out[at + 1] = number >> 8, number & 255
