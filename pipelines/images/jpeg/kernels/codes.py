"""Read Huffman codes from bits without byte stuffing, and write them to bytes with it."""

import numpy as np

from pipelines.images.jpeg.kernels.words import U64, ZERO, bits_at, compiled, store, word_at

# A Huffman table is a row of int32. It holds, in order:
# - for each value of the next 9 bits, the code that they begin with (length << 8 | symbol)
# - for each length, the greatest code
# - for each length, what to add to a code to get the index of its symbol
# - the symbols in order
# - for each symbol, its code (length << 16 | code)
_QUICK_BITS = 9
_GREATEST, _SHIFT, _SYMBOLS, _CODES = 512, 512 + 17, 512 + 34, 512 + 34 + 256
TABLE_ROW = _CODES + 256
NUM_TABLES = 8
"""Four DC tables, then four AC tables."""

PADDING_BYTES = 16
"""Number of zeros that must follow unstuffed data, so that reading ahead needs no bounds check."""
SPARE_BYTES = 256
"""Largest size of new DC codes and a marker, on top of twice the bytes that are copied."""
DAMAGED = -1
EOI = np.int64(0xD9)
_LOW, _HIGH = U64(0x0101010101010101), U64(0x8080808080808080)


@compiled
def fill_tables(data, start, stop, tables):
    """Convert the content of a DHT segment to table rows; return False if it is damaged."""
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
    """Return length << 8 | symbol of the code at the start of a word; 0 if there is none."""
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
    """Return the number of bits of a DC code with its extra bits (0 if there is no code), and the difference."""
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
    """Return the bit after a block whose AC codes start at `at`; DAMAGED if that would exceed `stop`."""
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
    """Return the code of a DC difference with its extra bits, and their number of bits; 0 if it has no code."""
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
    """Append `length` bits (at most 32) to the waiting ones, and write complete bytes with byte stuffing."""
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
    """Append the bits [at, stop) of unstuffed data to the waiting ones."""
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
    """Pad the last byte with ones and append the marker; return the end of the output."""
    if num_waiting:
        length = 8 - num_waiting
        out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, U64((1 << length) - 1), length)
    out[out_at], out[out_at + 1] = 0xFF, marker
    return out_at + 2


@compiled
def _has_ones(word):
    """Return whether any byte of the word is 0xFF."""
    return (~word - _LOW) & word & _HIGH != 0


@compiled
def unstuff(data, start, stop, out):
    """Copy bytes without byte stuffing and pad them with zeros; return their number, or DAMAGED if one is a marker."""
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
