"""Huffman tables as stored in a JPEG header (T.81, annex C): codes of equal length are consecutive."""

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.images.jpeg import DHT, Part

# Number of size categories of DC differences for 8-bit samples.
_DC_SIZES = 12
_MAX_LENGTH = 16


class Huffman(NamedTuple):
    """A Huffman table: the number of codes of each length, 1 to 16, and their symbols in order."""

    counts: bytes
    symbols: bytes


def read_tables(content: bytes, parts: Sequence[Part]) -> dict[int, Huffman]:
    """Return the header's tables, keyed by class (0 for DC, 16 for AC) + number.

    Raises ValueError if one is damaged.
    """
    found: dict[int, Huffman] = {}
    for part in parts:
        at = part.start
        while part.marker == DHT and at < part.stop:
            counts = content[at + 1 : at + 17]
            stop = at + 17 + sum(counts)
            if len(counts) < 16 or stop > part.stop:
                raise ValueError("a damaged Huffman table")
            found[content[at]] = Huffman(counts, content[at + 17 : stop])
            at = stop
    return found


def tables_content(tables: dict[int, Huffman]) -> bytes:
    """Serialise the tables to the content of a DHT segment."""
    return b"".join(bytes([number]) + table.counts + table.symbols for number, table in sorted(tables.items()))


def completed(table: Huffman) -> Huffman:
    """Return a DC table with a code for every size; existing codes are unchanged.

    An optimised table lacks the sizes that its file does not use. New codes begin with the all-ones code, which T.81
    reserves, and the all-ones code of the greatest length remains reserved. Raises ValueError if there is no room.
    """
    missing = bytes(size for size in range(_DC_SIZES) if size not in table.symbols)
    if not missing:
        return table
    counts = list(table.counts)
    taken = sum(count << (_MAX_LENGTH - length) for length, count in enumerate(counts, start=1))
    for length in range(max(len(table.counts.rstrip(b"\0")), 1), _MAX_LENGTH + 1):
        if taken + (len(missing) + 1 << (_MAX_LENGTH - length)) <= 1 << _MAX_LENGTH:
            counts[length - 1] += len(missing)
            return Huffman(bytes(counts), table.symbols + missing)
    raise ValueError("a Huffman table without room for more codes")
