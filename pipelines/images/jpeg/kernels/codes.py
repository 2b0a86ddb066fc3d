"""Huffman codes read from bits without stuffing, and written to bytes with it."""

import numpy as np

from pipelines.images.jpeg.kernels.words import U64, ZERO, bits_at, compiled, store, word_at

# A Huffman table is a row of int32: by 9 bits the code that they begin with (its length << 8 | symbol), by length the
# greatest code and what takes a code to its symbol's place, symbols in order, and by symbol length << 16 | code.
_QUICK_BITS = 9
_GREATEST, _SHIFT, _SYMBOLS, _CODES = 512, 512 + 17, 512 + 34, 512 + 34 + 256
TABLE_ROW = _CODES + 256
NUM_TABLES = 8
"""Four DC tables, then four AC tables."""

PADDING_BYTES = 16
"""Zeros that must follow unstuffed data, so that reading ahead needs no check of its own."""
SPARE_BYTES = 256
"""What new DC codes and a marker take at most, behind twice the bytes that are copied."""
DAMAGED = -1
EOI = np.int64(0xD9)
_LOW, _HIGH = U64(0x0101010101010101), U64(0x8080808080808080)


@compiled
def fill_tables(data, start, stop, tables):
    """The content of a DHT part becomes rows; False where it is damaged."""
    at = start
    while at < stop:
        if at + 17 > stop or data[at] >> 4 > 1 or data[at] & 15 > 3:
            return False
        row = tables[(data[at] >> 4) * 4 + (data[at] & 15)]
        for place in range(TABLE_ROW):
            row[place] = 0
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


@compiled
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


@compiled
def read_dc(row, word):
    """The bits that a DC code and what follows take, 0 where there is none, and the difference that it says."""
    found = _code(row, word)
    length, size = found >> 8, found & 255
    if length == 0 or size > 11:
        return 0, 0
    if size == 0:
        return length, 0
    value = np.int64(word << U64(length) >> U64(64 - size))
    return length + size, value if value >> (size - 1) else value - (1 << size) + 1


@compiled
def block_end(data, at, stop, row):
    """The bit after a block whose AC codes start at `at`; DAMAGED where it would lie behind `stop`."""
    place, known = 1, 0
    word = U64(0)
    while place < 64:
        if known < 31:
            if at >= stop:
                return DAMAGED
            word, known = bits_at(data, at), 57
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


@compiled
def dc_code(row, difference):
    """The code of a DC difference with the bits that follow, and how many these are; 0 where there is none."""
    size, rest = 0, abs(difference)
    while rest:
        size, rest = size + 1, rest >> 1
    if size > 11 or row[_CODES + size] == 0:
        return U64(0), ZERO
    packed = np.int64(row[_CODES + size])
    extra = difference if difference >= 0 else difference + (1 << size) - 1
    return U64((packed & 0xFFFF) << size | extra), (packed >> 16) + size


@compiled
def put(out, out_at, waiting, num_waiting, code, length):
    """The bits (at most 32) behind those that wait; whole bytes are written, stuffed."""
    waiting = waiting << U64(length) | code
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


@compiled
def copy(data, at, stop, out, out_at, waiting, num_waiting):
    """The bits [at, stop) of unstuffed data behind those that wait."""
    if num_waiting and stop - at >= 8:
        length = 8 - num_waiting
        code = bits_at(data, at) >> U64(64 - length)
        out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, code, length)
        at += length
    if num_waiting == 0:
        shift = U64(at & 7)
        byte = at >> 3
        for _ in range((stop - at) >> 6):
            word = word_at(data, byte)
            if shift:
                word = word << shift | U64(data[U64(byte + 8)]) >> (U64(8) - shift)
            byte += 8
            if _has_ones(word):
                for place in range(8):
                    value = word >> U64(56 - 8 * place) & U64(255)
                    out[out_at] = value
                    out_at += 1
                    if value == U64(255):
                        out[out_at] = 0
                        out_at += 1
            else:
                store(out, out_at, word)
                out_at += 8
        at += (stop - at) >> 6 << 6
    while at < stop:
        length = min(stop - at, 32)
        code = bits_at(data, at) >> U64(64 - length)
        out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, code, length)
        at += length
    return out_at, waiting, num_waiting


@compiled
def close(out, out_at, waiting, num_waiting, marker):
    """Where the output ends once bits are filled up to a byte and the marker follows."""
    if num_waiting:
        length = 8 - num_waiting
        out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, U64((1 << length) - 1), length)
    out[out_at], out[out_at + 1] = 0xFF, marker
    return out_at + 2


@compiled
def _has_ones(word):
    """Whether a byte of it is 0xFF."""
    return (~word - _LOW) & word & _HIGH != 0


@compiled
def unstuff(data, start, stop, out):
    """How many bytes are behind those without stuffing, zeros behind them; DAMAGED for a marker among them."""
    at, count = start, 0
    while at < stop:
        if at + 8 <= stop:
            word = word_at(data, at)
            if not _has_ones(word):
                store(out, count, word)
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
    for place in range(PADDING_BYTES):
        out[count + place] = 0
    return count
