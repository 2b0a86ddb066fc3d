"""Huffman tables of a JPEG, and the walk over its codes that finds where blocks begin without decoding any."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.jpeg import DHT, Part

# Figures of a step, packed into one int: the bits that it takes, and from this bit on how far it moves in the block.
_BITS = 6
_END_OF_BLOCK = 128
_INVALID = 4096
# T.81, table K.3: a code for each of the twelve sizes of a DC difference of 8-bit samples.
_STANDARD_DC = (bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), bytes(range(12)))


@dataclass(frozen=True, eq=False)
class Huffman:
    """One table, by the 16 bits at hand and by symbol. A symbol's low four bits say how many bits follow its code."""

    symbols: NDArray[np.int64]
    """By 16 bits: the symbol whose code they begin with."""
    lengths: NDArray[np.int64]
    """By 16 bits: that code's length, 0 where there is none."""
    codes: NDArray[np.int64]
    """By symbol."""
    code_lengths: NDArray[np.int64]
    """By symbol, 0 where it has no code."""

    @classmethod
    def of(cls, counts: bytes, values: bytes) -> "Huffman":
        """From the number of codes of each length and their symbols in order. Raises ValueError for no table at all."""
        symbols, lengths = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
        codes, code_lengths = np.zeros(256, np.int64), np.zeros(256, np.int64)
        code, place = 0, 0
        for length, count in enumerate(counts, start=1):
            if code + count > 1 << length:
                raise ValueError("a damaged Huffman table")
            for symbol in values[place : place + count]:
                first = code << (16 - length)
                symbols[first : first + (1 << (16 - length))] = symbol
                lengths[first : first + (1 << (16 - length))] = length
                codes[symbol], code_lengths[symbol] = code, length
                code += 1
            place += count
            code <<= 1
        return cls(symbols, lengths, codes, code_lengths)

    @cached_property
    def dc_bits(self) -> list[int]:
        """By 16 bits: how many bits a DC code and what follows it take, 0 where there is no such code."""
        return np.where(self.lengths > 0, self.lengths + (self.symbols & 15), 0).tolist()

    @cached_property
    def ac_step(self) -> list[int]:
        """By 16 bits: one AC code's step, bits and distance packed."""
        bits, distance = self._ac
        return (bits | distance << _BITS).tolist()

    @cached_property
    def ac_steps(self) -> list[int]:
        """By 16 bits: the step over all codes that lie in them whole, with their bits, up to an end of block."""
        bits, distance = self._ac
        at, total = bits.copy(), distance.copy()
        going = distance < 64
        while going.any():
            window = np.arange(1 << 16) << np.minimum(at, 16) & 0xFFFF
            going &= (at + bits[window] <= 16) & (distance[window] != _INVALID)
            at += np.where(going, bits[window], 0)
            total += np.where(going, distance[window], 0)
            going &= distance[window] < 64
        return (at | total << _BITS).tolist()

    @cached_property
    def _ac(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """By 16 bits: the bits that one AC code takes with those that follow it, and how far it moves."""
        run, size = self.symbols >> 4, self.symbols & 15
        distance = np.where((size == 0) & (run < 15), np.where(run == 0, _END_OF_BLOCK, _INVALID), run + 1)
        return self.lengths + size, np.where(self.lengths > 0, distance, _INVALID)


@lru_cache(maxsize=32)
def _table(counts: bytes, values: bytes) -> Huffman:
    return Huffman.of(counts, values)


STANDARD_DC = _table(*_STANDARD_DC)


def table_part(number: int) -> bytes:
    """The content of a DHT part that makes STANDARD_DC the DC table of that number."""
    return bytes([number]) + b"".join(_STANDARD_DC)


def read_tables(content: bytes, parts: Sequence[Part]) -> tuple[dict[int, Huffman], dict[int, Huffman]]:
    """The header's DC tables and AC tables by number. Raises ValueError where one is damaged."""
    found: tuple[dict[int, Huffman], dict[int, Huffman]] = {}, {}
    for part in parts:
        at = part.start
        while part.marker == DHT and at < part.stop:
            counts = content[at + 1 : at + 17]
            stop = at + 17 + sum(counts)
            if stop > part.stop or content[at] >> 4 > 1:
                raise ValueError("a damaged Huffman table")
            found[content[at] >> 4][content[at] & 15] = _table(counts, content[at + 17 : stop])
            at = stop
    return found


def walk(
    data: bytes, first_bits: Sequence[int], num_mcus: Sequence[int], tables: Sequence[tuple[Huffman, Huffman]]
) -> tuple[list[int], list[int]]:
    """The bit at which each block starts, and at which each segment's last block ends.

    Segment i starts at `first_bits[i]` and has `num_mcus[i]` MCUs; an MCU's blocks have these DC and AC tables. Raises
    ValueError for a code that does not exist, and IndexError where the data end too early.
    """
    padded = np.frombuffer(data + bytes(4), np.uint8).astype(np.int64)
    words = (padded[:-3] << 16 | padded[1:-2] << 8 | padded[2:-1]).tolist()
    plan = [(dc.dc_bits, ac.ac_steps, ac.ac_step) for dc, ac in tables]
    starts: list[int] = []
    ends: list[int] = []
    for first, count in zip(first_bits, num_mcus):
        at = first
        for _ in range(count):
            for dc, steps, step in plan:
                starts.append(at)
                at = after_dc = at + dc[words[at >> 3] >> 8 - (at & 7) & 0xFFFF]
                place = 1
                while place < 64:
                    moved = steps[words[at >> 3] >> 8 - (at & 7) & 0xFFFF]
                    at += moved & 63
                    place += moved >> 6
                if place != 64 and not 128 < place < 192:
                    # A block that is full has no end code: several codes at a time may have run over its end.
                    at = _block_end(words, after_dc, step)
        ends.append(at)
    return starts, ends


def _block_end(words: list[int], at: int, step: list[int]) -> int:
    """The bit after a block whose AC codes start at `at`, one code at a time."""
    place = 1
    while place < 64:
        moved = step[words[at >> 3] >> 8 - (at & 7) & 0xFFFF]
        at += moved & 63
        place += moved >> 6
    if place != 64 and not 128 < place < 192:
        raise ValueError("a Huffman code that does not exist")
    return at
