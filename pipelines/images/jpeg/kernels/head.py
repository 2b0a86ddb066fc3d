"""Read the header of a JPEG with an index, and write the header of the part that is cut out."""

import numpy as np

from pipelines.images.jpeg.kernels.codes import DAMAGED, fill_tables
from pipelines.images.jpeg.kernels.words import ZERO, compiled

# Facts: size of the image; top left pixel of the part that is cut out; number of components; offset of the size in the
# new file; size of an MCU; MCUs per tile; begin and end of the index's numbers; and for every component its sampling
# factors and table rows.
HEIGHT, WIDTH, TOP, LEFT = range(4)
COUNT, SIZE_AT, MCU_HEIGHT, MCU_WIDTH, TILE_MCUS, INDEX, INDEX_STOP, COMPONENTS = range(4, 12)
NUM_FACTS = COMPONENTS + 4 * 3
INDEX_HEAD = 14
"""Bytes of the index's segment before its numbers: marker, length, name, checksum, and MCUs per tile."""
_MAX_PARTS = 100
_SOI, _DHT, _DRI, _SOS = 0xD8, 0xC4, 0xDD, 0xDA


@compiled
def read_head(data, index_at, out, facts, tables):
    """Parse the header and copy it to `out` without the index; return the scan's offsets in both, or DAMAGED twice."""
    damaged = DAMAGED, DAMAGED
    if len(data) < 4 or data[0] != 0xFF or data[1] != _SOI:
        return damaged
    out[0], out[1] = 0xFF, _SOI
    at, out_at = ZERO + 2, ZERO + 2
    for _ in range(_MAX_PARTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return damaged
        marker = data[at + 1]
        stop = at + 2 + (np.int64(data[at + 2]) << 8 | np.int64(data[at + 3]))
        if stop < at + 4 or stop > len(data) or marker == _DRI:
            return damaged
        if at == index_at:
            if stop - at < INDEX_HEAD + 4:
                return damaged
            facts[INDEX], facts[INDEX_STOP] = at + INDEX_HEAD, stop
            facts[TILE_MCUS] = np.int64(data[at + INDEX_HEAD - 2]) << 8 | np.int64(data[at + INDEX_HEAD - 1])
            at = stop
            continue
        if marker == _DHT and not fill_tables(data, at + 4, stop, tables):
            return damaged
        if marker == 0xC0 or marker == 0xC1:
            if not _frame(data, at + 4, stop, facts):
                return damaged
            facts[SIZE_AT] = out_at + 5
        # A loop, because slice assignment takes seconds to compile.
        for place in range(stop - at):
            out[out_at + place] = data[at + place]
        at, out_at = stop, out_at + stop - at
        if marker == _SOS:
            return (at, out_at) if _scan(data, at, facts) else damaged
    return damaged


@compiled
def _frame(data, start, stop, facts):
    """Store size and sampling factors in the facts; return False for a frame that an index does not support."""
    if stop - start < 9:
        return False
    count = np.int64(data[start + 5])
    if stop - start != 6 + 3 * count or (count != 1 and count != 3) or data[start] != 8:
        return False
    facts[HEIGHT] = np.int64(data[start + 1]) << 8 | np.int64(data[start + 2])
    facts[WIDTH] = np.int64(data[start + 3]) << 8 | np.int64(data[start + 4])
    facts[COUNT] = count
    for i in range(count):
        factors = np.int64(data[start + 7 + 3 * i])
        # A single component is not interleaved: its MCU is one block, regardless of its sampling factors.
        across, down = factors >> 4, factors & 15
        if count == 1:
            across, down = ZERO + 1, ZERO + 1
        if not 1 <= across <= 4 or not 1 <= down <= 4:
            return False
        facts[COMPONENTS + 4 * i], facts[COMPONENTS + 4 * i + 1] = across, down
        facts[MCU_WIDTH] = max(facts[MCU_WIDTH], 8 * across)
        facts[MCU_HEIGHT] = max(facts[MCU_HEIGHT], 8 * down)
    return facts[HEIGHT] > 0 and facts[WIDTH] > 0


@compiled
def _scan(data, stop, facts):
    """Store the components' tables in the facts; return False if the scan does not fit the frame or has no index."""
    count = facts[COUNT]
    start = stop - 4 - 2 * count
    if count == 0 or facts[TILE_MCUS] == 0 or start < 2 or data[start] != count:
        return False
    for i in range(count):
        numbers = np.int64(data[start + 2 + 2 * i])
        if numbers >> 4 > 3 or numbers & 15 > 3:
            return False
        facts[COMPONENTS + 4 * i + 2] = numbers >> 4
        facts[COMPONENTS + 4 * i + 3] = 4 + (numbers & 15)
    return True
