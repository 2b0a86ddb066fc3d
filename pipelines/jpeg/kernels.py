"""Loops over the bits of a JPEG, compiled. They check every read and write: bytes and numbers may be anyone's.

All of them are in this file, because numba keeps a compiled function for as long as its own file is unchanged.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

U64 = np.uint64

# A Huffman table is a row of int32: by 9 bits the code that they begin with (its length << 8 | symbol), by length the
# greatest code and what takes a code to its symbol's place, symbols in order, and by symbol length << 16 | code.
_QUICK_BITS = 9
_GREATEST, _SHIFT, _SYMBOLS, _CODES = 512, 512 + 17, 512 + 34, 512 + 34 + 256
TABLE_ROW = _CODES + 256
NUM_TABLES = 8
"""Four DC tables, then four AC tables."""

PADDING_BYTES = 16
"""Zeros that must follow unstuffed data, so that reading ahead needs no check of its own."""
INDEX_HEAD = 14
"""Bytes of the index's part before its numbers: marker, length, name, checksum, and MCUs a tile."""
DAMAGED, OUTSIDE = -1, -2
MAX_QUOTIENT, MAX_SIZE = 24, 24
"""Of a number of the index: what is coded in unary, and the bits of the rest."""
MAX_DC = 1 << 15
# Bytes that new DC codes and a marker take at most, behind what is twice as long as what it is copied from.
_SPARE = 256


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # No folder where a compiled function could be kept.
        return numba.njit(nogil=True)(function)


@_compiled
def fill_tables(data, start, stop, tables):
    """The content of a DHT part becomes rows; False where it is damaged."""
    at = start
    while at < stop:
        if at + 17 > stop or data[at] >> 4 > 1 or data[at] & 15 > 3:
            return False
        row = tables[(data[at] >> 4) * 4 + (data[at] & 15)]
        row[:] = 0
        code = 0
        place = 0
        for length in range(1, 17):
            count = np.int64(data[at + length])
            if code + count > 1 << length or place + count > 256 or at + 17 + place + count > stop:
                return False
            row[_SHIFT + length] = place - code
            for _ in range(count):
                symbol = np.int64(data[at + 17 + place])
                row[_SYMBOLS + place] = symbol
                row[_CODES + symbol] = length << 16 | code
                if length <= _QUICK_BITS:
                    first = code << (_QUICK_BITS - length)
                    for quick in range(first, first + (1 << (_QUICK_BITS - length))):
                        row[quick] = length << 8 | symbol
                code += 1
                place += 1
            row[_GREATEST + length] = code - 1 if count else -1
            code <<= 1
        at += 17 + place
    return True


@intrinsic
def _word(typing, data, at):
    """The 64 bits from that byte on; a shift of eight bytes at a time is not put together to one load where it counts."""

    def build(context, builder, signature, values):
        pointer = _pointer(context, builder, signature, values)
        return builder.bswap(builder.load(pointer, align=1))

    return types.uint64(data, types.intp), build


@intrinsic
def _store(typing, data, at, word):
    """The word becomes the eight bytes from there on."""

    def build(context, builder, signature, values):
        pointer = _pointer(context, builder, signature, values)
        builder.store(builder.bswap(values[2]), pointer, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), build


@intrinsic
def _leading_ones(typing, word):
    def build(context, builder, signature, values):
        return builder.ctlz(builder.not_(values[0]), ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


def _pointer(context, builder, signature, values):
    array = arrayobj.make_array(signature.args[0])(context, builder, values[0])
    return builder.bitcast(builder.gep(array.data, [values[1]]), ir.IntType(64).as_pointer())


@_compiled
def _bits(data, at):
    """A word whose first 57 bits are those from bit `at` on."""
    return _word(data, at >> 3) << U64(at & 7)


@_compiled
def _code(row, word):
    """Length << 8 | symbol of the code that a word begins with; 0 where there is none."""
    found = np.int64(row[np.int64(word >> U64(64 - _QUICK_BITS))])
    if found:
        return found
    for length in range(_QUICK_BITS + 1, 17):
        code = np.int64(word >> U64(64 - length))
        if code <= row[_GREATEST + length]:
            return length << 8 | np.int64(row[_SYMBOLS + (code + row[_SHIFT + length] & 255)])
    return 0


@_compiled
def _dc(row, word):
    """The bits that a DC code and what follows take, 0 where there is none, and the difference that it says."""
    found = _code(row, word)
    length, size = found >> 8, found & 255
    if length == 0 or size > 11:
        return 0, 0
    if size == 0:
        return length, 0
    value = np.int64(word << U64(length) >> U64(64 - size))
    return length + size, value if value >> (size - 1) else value - (1 << size) + 1


@_compiled
def _block_end(data, at, stop, row):
    """The bit after a block whose AC codes start at `at`; DAMAGED where it would lie behind `stop`."""
    place, known = 1, 0
    word = U64(0)
    while place < 64:
        if known < 31:
            if at >= stop:
                return DAMAGED
            word, known = _bits(data, at), 57
        found = _code(row, word)
        if found == 0:
            return DAMAGED
        symbol = found & 255
        taken = (found >> 8) + (symbol & 15)
        at, known, word = at + taken, known - taken, word << U64(taken)
        if symbol == 0:
            break
        if symbol & 15 == 0 and symbol != 0xF0:
            return DAMAGED
        place += (symbol >> 4) + 1
    return at if place <= 64 and at <= stop else DAMAGED


@_compiled
def walk(data, first_bits, num_mcus, plan, tables, starts, dc_stops, stops, dc):
    """Of every block where it starts, where its DC code ends, where it ends, and its DC coefficient; False for damage.

    Segment i has the bits from first_bits[i] to first_bits[i + 1]; it ends with less than a byte of padding. An MCU's
    blocks have these components and rows of tables.
    """
    block = 0
    last = np.zeros(3, np.int64)
    for segment in range(len(num_mcus)):
        at, stop = first_bits[segment], first_bits[segment + 1]
        last[:] = 0
        for _ in range(num_mcus[segment]):
            for place in range(len(plan)):
                if at >= stop:
                    return False
                component = plan[place, 0]
                starts[block] = at
                taken, difference = _dc(tables[plan[place, 1]], _bits(data, at))
                last[component] += difference
                dc[block], dc_stops[block] = last[component], at + taken
                at = _block_end(data, at + taken, stop, tables[plan[place, 2]])
                if taken == 0 or at == DAMAGED:
                    return False
                stops[block] = at
                block += 1
        if stop - at >= 8:
            return False
    return True


@_compiled
def rewrite(data, plan, tables, dc_stops, stops, dc, interval, out, offsets):
    """The length of the same blocks with a restart marker every `interval` MCUs, written to `out`, with the offsets of
    the segments; DAMAGED where a DC difference has no code."""
    waiting, num_waiting, out_at = U64(0), 0, 0
    last = np.zeros(3, np.int64)
    for mcu in range(len(dc) // len(plan)):
        if mcu % interval == 0:
            if mcu:
                out_at = _closed(out, out_at, waiting, num_waiting, _RST0 + (mcu // interval - 1) % 8)
                waiting, num_waiting = U64(0), 0
            offsets[mcu // interval] = out_at
            last[:] = 0
        for place in range(len(plan)):
            block, component = mcu * len(plan) + place, plan[place, 0]
            if out_at + (stops[block] - dc_stops[block] >> 2) + _SPARE > len(out):
                return DAMAGED
            code, length = _dc_code(tables[plan[place, 1]], dc[block] - last[component])
            if length == 0:
                return DAMAGED
            last[component] = dc[block]
            out_at, waiting, num_waiting = _put(out, out_at, waiting, num_waiting, code, length)
            out_at, waiting, num_waiting = _copy(
                data, dc_stops[block], stops[block], out, out_at, waiting, num_waiting
            )
    return _closed(out, out_at, waiting, num_waiting, _EOI)


# What `_head` finds: the frame, where height and width stand in the new file, the index, and of every component its
# factors and rows of tables.
_HEIGHT, _WIDTH, _COUNT, _SIZE_AT, _MCU_HEIGHT, _MCU_WIDTH, _TILE_MCUS, _INDEX, _INDEX_STOP, _FACTORS = range(10)
_NUM_FACTS = _FACTORS + 4 * 3
_MAX_PARTS = 100
_SOI, _EOI, _RST0, _DHT, _DRI, _SOS = 0xD8, 0xD9, 0xD0, 0xC4, 0xDD, 0xDA


@_compiled
def _head(data, index_at, out, facts, tables):
    """Where the scan begins in the file, and in `out`, which has the file's header without the index; DAMAGED twice."""
    damaged = DAMAGED, DAMAGED
    if len(data) < 4 or data[0] != 0xFF or data[1] != _SOI:
        return damaged
    out[0], out[1] = 0xFF, _SOI
    at, out_at = 2, 2
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
            facts[_INDEX], facts[_INDEX_STOP] = at + INDEX_HEAD, stop
            facts[_TILE_MCUS] = np.int64(data[at + INDEX_HEAD - 2]) << 8 | np.int64(data[at + INDEX_HEAD - 1])
            at = stop
            continue
        if marker == _DHT and not fill_tables(data, at + 4, stop, tables):
            return damaged
        if marker in (0xC0, 0xC1):
            if not _frame(data, at + 4, stop, facts):
                return damaged
            facts[_SIZE_AT] = out_at + 5
        out[out_at : out_at + stop - at] = data[at:stop]
        at, out_at = stop, out_at + stop - at
        if marker == _SOS:
            return (at, out_at) if _scan(data, at, facts) else damaged
    return damaged


@_compiled
def _frame(data, start, stop, facts):
    """Size and factors become facts; False for what has no index."""
    if stop - start < 9:
        return False
    count = np.int64(data[start + 5])
    if stop - start != 6 + 3 * count or count not in (1, 3) or data[start] != 8:
        return False
    facts[_HEIGHT] = np.int64(data[start + 1]) << 8 | np.int64(data[start + 2])
    facts[_WIDTH] = np.int64(data[start + 3]) << 8 | np.int64(data[start + 4])
    facts[_COUNT] = count
    for i in range(count):
        factors = np.int64(data[start + 7 + 3 * i])
        # A single component is not interleaved: its MCU is one block whatever its factors.
        across, down = (factors >> 4, factors & 15) if count > 1 else (1, 1)
        if not 1 <= across <= 4 or not 1 <= down <= 4:
            return False
        facts[_FACTORS + 4 * i], facts[_FACTORS + 4 * i + 1] = across, down
        facts[_MCU_WIDTH] = max(facts[_MCU_WIDTH], 8 * across)
        facts[_MCU_HEIGHT] = max(facts[_MCU_HEIGHT], 8 * down)
    return facts[_HEIGHT] > 0 and facts[_WIDTH] > 0


@_compiled
def _scan(data, stop, facts):
    """The components' tables become facts; False where the scan is not the frame's, or there was no index."""
    count = facts[_COUNT]
    start = stop - 4 - 2 * count
    if count == 0 or facts[_TILE_MCUS] == 0 or start < 2 or data[start] != count:
        return False
    for i in range(count):
        numbers = np.int64(data[start + 2 + 2 * i])
        if numbers >> 4 > 3 or numbers & 15 > 3:
            return False
        facts[_FACTORS + 4 * i + 2] = numbers >> 4
        facts[_FACTORS + 4 * i + 3] = 4 + (numbers & 15)
    return True


@_compiled
def read_index(data, start, stop, tiles_per_row, starts, dc):
    """Bits that tiles start at, from the scan on, and DC coefficients before them; False where the numbers end early.

    Each number is what it differs by from that of the tile above (in the first row: of the tile before).
    """
    num_tiles, num_fields = len(starts) - 1, dc.shape[1] + 1
    if stop > len(data) - 8 or start + num_fields > stop:
        return False
    at, end = 8 * (start + num_fields), 8 * stop
    starts[0] = 0
    dc[0] = 0
    for tile in range(num_tiles):
        above = tile - tiles_per_row
        before = above if above >= 0 else tile - 1
        for field in range(num_fields):
            if at >= end:
                return False
            word = _bits(data, at)
            quotient = min(np.int64(_leading_ones(word)), MAX_QUOTIENT)
            size = np.int64(data[start + field]) & 31
            word <<= U64(quotient + 1)
            rest = np.int64(word >> U64(1) >> U64(63 - size))
            at += quotient + 1 + size
            code = quotient << size | rest
            step = (code >> 1) ^ -(code & 1)
            if field:
                coefficient = step + (dc[before + 1, field - 1] if before >= 0 else 0)
                if abs(coefficient) > MAX_DC:
                    return False
                dc[tile + 1, field - 1] = coefficient
            else:
                length = step + (starts[before + 1] - starts[before] if before >= 0 else 0)
                if not 0 < length < 1 << 31:
                    return False
                starts[tile + 1] = starts[tile] + length
    return at <= end


@_compiled
def _put(out, out_at, waiting, num_waiting, code, length):
    """The bits (at most 32) behind those that wait; whole bytes are written, stuffed."""
    waiting = waiting << U64(length) | U64(code)
    num_waiting += length
    while num_waiting >= 8:
        num_waiting -= 8
        value = waiting >> U64(num_waiting) & U64(255)
        out[out_at] = value
        out_at += 1
        if value == U64(255):
            out[out_at] = 0
            out_at += 1
    return out_at, waiting & U64(255), num_waiting


@_compiled
def _copy(data, at, stop, out, out_at, waiting, num_waiting):
    """The bits [at, stop) of unstuffed data behind those that wait."""
    low, high = U64(0x0101010101010101), U64(0x8080808080808080)
    if num_waiting and stop - at >= 8:
        length = 8 - num_waiting
        code = _bits(data, at) >> U64(64 - length)
        out_at, waiting, num_waiting = _put(out, out_at, waiting, num_waiting, code, length)
        at += length
    if num_waiting == 0:
        shift = U64(at & 7)
        byte = at >> 3
        for _ in range((stop - at) >> 6):
            word = _word(data, byte)
            if shift:
                word = word << shift | U64(data[U64(byte + 8)]) >> (U64(8) - shift)
            byte += 8
            inverse = ~word
            if (inverse - low) & word & high:
                for place in range(8):
                    value = word >> U64(56 - 8 * place) & U64(255)
                    out[out_at] = value
                    out_at += 1
                    if value == U64(255):
                        out[out_at] = 0
                        out_at += 1
            else:
                _store(out, out_at, word)
                out_at += 8
        at += (stop - at) >> 6 << 6
    while at < stop:
        length = min(stop - at, 32)
        code = _bits(data, at) >> U64(64 - length)
        out_at, waiting, num_waiting = _put(out, out_at, waiting, num_waiting, code, length)
        at += length
    return out_at, waiting, num_waiting


@_compiled
def _unstuff(data, start, stop, out):
    """How many bytes are behind those without stuffing, zeros behind them; DAMAGED for a marker among them."""
    low, high = U64(0x0101010101010101), U64(0x8080808080808080)
    at, count = start, 0
    while at < stop:
        if at + 8 <= stop:
            word = _word(data, at)
            if not (~word - low) & word & high:
                _store(out, count, word)
                at += 8
                count += 8
                continue
        value = data[at]
        out[count] = value
        at += 1
        count += 1
        if value == 0xFF and at < stop:
            if data[at] != 0:
                return DAMAGED
            at += 1
    out[count : count + PADDING_BYTES] = 0
    return count


@_compiled
def _closed(out, out_at, waiting, num_waiting, marker):
    """Where the output ends once bits are filled up to a byte and the marker follows."""
    if num_waiting:
        length = 8 - num_waiting
        out_at, waiting, num_waiting = _put(out, out_at, waiting, num_waiting, (1 << length) - 1, length)
    out[out_at], out[out_at + 1] = 0xFF, marker
    return out_at + 2


@_compiled
def _dc_code(row, difference):
    """The code of a DC difference with the bits that follow, and how many these are; 0 where there is none."""
    size, rest = 0, abs(difference)
    while rest:
        size, rest = size + 1, rest >> 1
    if size > 11 or row[_CODES + size] == 0:
        return 0, 0
    packed = np.int64(row[_CODES + size])
    extra = difference if difference >= 0 else difference + (1 << size) - 1
    return (packed & 0xFFFF) << size | extra, (packed >> 16) + size


@_compiled
def cut(data, index_at, box, out, work, found):
    """The length of a JPEG of the tiles under the box, written to `out`; DAMAGED where the file or its index is.

    `found` becomes height and width of the image, and row and column of its first pixel that the JPEG has.
    """
    facts, tables = np.zeros(_NUM_FACTS, np.int64), np.zeros((NUM_TABLES, TABLE_ROW), np.int32)
    found[:] = 0
    if len(out) < 2 * len(data) + _SPARE or len(work) < len(data) + PADDING_BYTES:
        return DAMAGED
    scan_at, out_at = _head(data, index_at, out, facts, tables)
    if scan_at == DAMAGED:
        return DAMAGED
    found[0], found[1] = facts[_HEIGHT], facts[_WIDTH]
    first_row, last_row, first, last, per_row = _tiles(facts, box)
    if last == 0:
        return OUTSIDE
    num_tiles = per_row * last_row
    if num_tiles > 8 * len(data):
        return DAMAGED
    starts, dc = np.empty(num_tiles + 1, np.int64), np.empty((num_tiles + 1, facts[_COUNT]), np.int64)
    is_read = read_index(data, facts[_INDEX], facts[_INDEX_STOP], per_row, starts, dc)
    if not is_read or 8 * scan_at + starts[num_tiles] > 8 * (len(data) - 2):
        return DAMAGED
    row_px, tile_px = facts[_MCU_HEIGHT], facts[_MCU_WIDTH] * facts[_TILE_MCUS]
    found[2], found[3] = first_row * row_px, first * tile_px
    _write_size(out, facts[_SIZE_AT], min(found[0], last_row * row_px) - found[2])
    _write_size(out, facts[_SIZE_AT] + 2, min(found[1], last * tile_px) - found[3])
    last_dc = np.zeros(facts[_COUNT], np.int64)
    waiting, num_waiting = U64(0), 0
    for row in range(first_row, last_row):
        begin, end = row * per_row + first, row * per_row + last
        bits = 8 * scan_at + starts[begin], 8 * scan_at + starts[end]
        out_at, waiting, num_waiting = _strip(
            data, bits, facts, tables, dc[begin], last_dc, work, out, out_at, waiting, num_waiting
        )
        if out_at == DAMAGED:
            return DAMAGED
        last_dc[:] = dc[end]
    return _closed(out, out_at, waiting, num_waiting, _EOI)


@_compiled
def _tiles(facts, box):
    """First and last row, first and last tile in it, and tiles a row, of those under the box; zeros for one outside."""
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1:
        return 0, 0, 0, 0, 0
    bottom, right = top + height, left + width
    if bottom > facts[_HEIGHT] or right > facts[_WIDTH]:
        return 0, 0, 0, 0, 0
    # Smooth upsampling looks at the neighbouring sample of a subsampled plane.
    margin = 2 if facts[_MCU_HEIGHT] * facts[_MCU_WIDTH] > 64 else 0
    row_px, tile_px = facts[_MCU_HEIGHT], facts[_MCU_WIDTH] * facts[_TILE_MCUS]
    last_row = -(-min(facts[_HEIGHT], bottom + margin) // row_px)
    last = -(-min(facts[_WIDTH], right + margin) // tile_px)
    return max(0, top - margin) // row_px, last_row, max(0, left - margin) // tile_px, last, -(-facts[_WIDTH] // tile_px)


@_compiled
def _strip(data, bits, facts, tables, dc, last_dc, work, out, out_at, waiting, num_waiting):
    """Those bits of a row of MCUs behind the others: each component's first DC code is coded anew, from the last DC
    coefficient of the strip before; `dc` is the one that it was coded from."""
    damaged = DAMAGED, waiting, num_waiting
    if out_at + 2 * (bits[1] - bits[0] >> 3) + _SPARE > len(out):
        return damaged
    size = _unstuff(data, bits[0] >> 3, bits[1] + 7 >> 3, work)
    if size == DAMAGED:
        return damaged
    at, stop = bits[0] & 7, 8 * size - (-bits[1] & 7)
    copied = at
    for i in range(facts[_COUNT]):
        fact = _FACTORS + 4 * i
        dc_row, ac_row = tables[facts[fact + 2]], tables[facts[fact + 3]]
        for block in range(facts[fact] * facts[fact + 1]):
            if at >= stop:
                return damaged
            taken, difference = _dc(dc_row, _bits(work, at))
            if block == 0:
                out_at, waiting, num_waiting = _copy(work, copied, at, out, out_at, waiting, num_waiting)
                code, length = _dc_code(dc_row, dc[i] + difference - last_dc[i])
                if length == 0:
                    return damaged
                out_at, waiting, num_waiting = _put(out, out_at, waiting, num_waiting, code, length)
                copied = at + taken
            at = _block_end(work, at + taken, stop, ac_row)
            if taken == 0 or at == DAMAGED:
                return damaged
    return _copy(work, copied, stop, out, out_at, waiting, num_waiting)


@_compiled
def _write_size(out, at, number):
    out[at], out[at + 1] = number >> 8, number & 255
