"""The entropy-coded data of a sequential JPEG, taken apart into blocks: where each lies, and its DC coefficient."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.jpeg import EOI, RST0, JpegHeader
from pipelines.jpeg.huffman import Huffman, read_tables, walk


@dataclass(frozen=True)
class Scan:
    """The entropy-coded bits, and of every block, in order, where its DC code and its other codes lie."""

    bits: NDArray[np.uint8]
    starts: NDArray[np.int64]
    dc_stops: NDArray[np.int64]
    stops: NDArray[np.int64]
    dc: NDArray[np.int64]
    """The DC coefficient itself, not the difference."""
    is_restart: NDArray[np.bool_]
    """Of every MCU: whether a segment of the source starts there."""
    dc_tables: dict[int, Huffman]


def blocks_of(header: JpegHeader) -> list[int]:
    """The component of each block of an MCU."""
    return [i for i, c in enumerate(header.components) for _ in range(c.across * c.down)]


def read_scan(content: bytes, header: JpegHeader) -> Scan:
    """The scan taken apart. Raises ValueError or IndexError where it is damaged or not the file's last."""
    num_mcus = header.mcu_rows * header.mcus_per_row
    interval = header.restart_interval or num_mcus
    pieces = _unstuffed(content, header.scan_at)
    if len(pieces) != -(-num_mcus // interval):
        raise ValueError("not as many segments as the header says")
    dc_tables, ac_tables = read_tables(content, header.parts)
    plan = blocks_of(header)
    tables = [(dc_tables.get(c.dc_table), ac_tables.get(c.ac_table)) for c in header.components]
    if any(table is None for pair in tables for table in pair):
        raise ValueError("a Huffman table is missing")
    first_bits = 8 * np.cumsum([0, *map(len, pieces)])
    data = b"".join(pieces)
    mcus = [min(interval, num_mcus - i * interval) for i in range(len(pieces))]
    starts, ends = walk(data, first_bits[:-1].tolist(), mcus, [tables[c] for c in plan])  # pyright: ignore[reportArgumentType] -- none is None
    if any(not 0 <= stop - end < 8 for end, stop in zip(ends, first_bits[1:].tolist())):
        raise ValueError("bits are left over")
    blocks = np.array(starts, dtype=np.int64)
    stops = np.append(blocks[1:], ends[-1])
    is_restart = np.arange(num_mcus) % interval == 0
    stops[np.flatnonzero(is_restart)[1:] * len(plan) - 1] = ends[:-1]
    differences, dc_stops = _dc_differences(data, blocks, plan, [tables[c][0] for c in plan])  # pyright: ignore[reportArgumentType]
    return Scan(
        bits=np.unpackbits(np.frombuffer(data, np.uint8)),
        starts=blocks,
        dc_stops=dc_stops,
        stops=stops,
        dc=_summed(differences, plan, is_restart),
        is_restart=is_restart,
        dc_tables=dc_tables,
    )


def _unstuffed(content: bytes, at: int) -> list[bytes]:
    """The scan's segments without markers and stuffing."""
    data = np.frombuffer(content, np.uint8, offset=at)
    places = np.flatnonzero(data[:-1] == 0xFF)
    markers = places[data[places + 1] != 0]
    pieces, start = [], at
    for place in markers.tolist():
        marker = int(data[place + 1])
        if marker == EOI[1]:
            return [*pieces, content[start : at + place].replace(b"\xff\x00", b"\xff")]
        if marker != RST0 + len(pieces) % 8:
            break
        pieces.append(content[start : at + place].replace(b"\xff\x00", b"\xff"))
        start = at + place + 2
    raise ValueError("the scan does not end with the file")


def _dc_differences(
    data: bytes, starts: NDArray[np.int64], plan: list[int], tables: list[Huffman]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every block the difference that its DC code says, and where that code ends."""
    padded = np.frombuffer(data + bytes(8), np.uint8).astype(np.int64)
    words = padded[:-4] << 32 | padded[1:-3] << 24 | padded[2:-2] << 16 | padded[3:-1] << 8 | padded[4:]
    window = words[starts >> 3] << (starts & 7) & (1 << 40) - 1
    lengths, sizes = np.empty_like(starts), np.empty_like(starts)
    for place, table in enumerate(tables):
        heads = window[place :: len(plan)] >> 24
        lengths[place :: len(plan)], sizes[place :: len(plan)] = table.lengths[heads], table.symbols[heads]
    extra = window >> (40 - lengths - sizes) & (1 << sizes) - 1
    negative = (sizes > 0) & (extra >> np.maximum(sizes - 1, 0) == 0)
    return np.where(negative, extra - (1 << sizes) + 1, extra), starts + lengths + sizes


def _summed(differences: NDArray[np.int64], plan: list[int], is_restart: NDArray[np.bool_]) -> NDArray[np.int64]:
    """DC coefficients: differences added up over each plane, from 0 at each restart."""
    by_mcu = differences.reshape(-1, len(plan))
    found = np.empty_like(by_mcu)
    restarts = np.flatnonzero(is_restart)
    for component in sorted(set(plan)):
        columns = [i for i, c in enumerate(plan) if c == component]
        total = np.cumsum(by_mcu[:, columns].reshape(-1))
        before = np.where(restarts > 0, total[restarts * len(columns) - 1], 0)
        lengths = np.diff(np.append(restarts, len(by_mcu))) * len(columns)
        found[:, columns] = (total - np.repeat(before, lengths)).reshape(-1, len(columns))
    return found.reshape(-1)
