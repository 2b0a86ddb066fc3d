"""Split a JPEG's scan into blocks by walking its Huffman codes, so that it can be rewritten."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.images.jpeg import ADOBE, DHT, DRI, EOI, JFIF, RST0, SOI, JpegHeader, kernels
from pipelines.images.jpeg.huffman import Huffman, completed, read_tables, tables_content


@dataclass(frozen=True)
class Scan:
    """A file's blocks in order: the bit positions of each block and its DC code, and its DC coefficient."""

    tables: dict[int, Huffman]
    """The header's tables, with a code for every DC difference."""
    rows: NDArray[np.int32]
    """The same tables in the layout of the kernels."""
    plan: NDArray[np.int64]
    """For every block of an MCU: its component, and the rows of its DC and AC tables."""
    stuffed: bytes
    """The entropy-coded data as in the file, and the EOI marker."""
    bits: NDArray[np.uint8]
    """The entropy-coded data without markers and byte stuffing, padded with zeros."""
    starts: NDArray[np.int64]
    dc_stops: NDArray[np.int64]
    stops: NDArray[np.int64]
    dc: NDArray[np.int64]


def read_scan(content: bytes, header: JpegHeader) -> Scan:
    """Split the scan into blocks. Raises ValueError if it is damaged or does not end the file."""
    num_mcus = header.mcu_rows * header.mcus_per_row
    interval = header.restart_interval or num_mcus
    pieces, end = _unstuffed(content, header.scan_at)
    if len(pieces) != -(-num_mcus // interval):
        raise ValueError("the number of segments differs from the header's")
    tables = _completed(content, header)
    bits = np.frombuffer(b"".join(pieces) + bytes(kernels.PADDING_BYTES), np.uint8)
    plan = np.array(
        [
            (i, component.dc_table, kernels.NUM_TABLES // 2 + component.ac_table)
            for i, component in enumerate(header.components)
            for _ in range(component.across * component.down)
        ]
    )
    rows = np.zeros((kernels.NUM_TABLES, kernels.TABLE_ROW), np.int32)
    listed = np.frombuffer(tables_content(tables), np.uint8)
    if not kernels.fill_tables(listed, 0, len(listed), rows):
        raise ValueError("a damaged Huffman table")
    first_bits = 8 * np.cumsum([0, *map(len, pieces)])
    mcus = np.array([min(interval, num_mcus - i * interval) for i in range(len(pieces))])
    starts, dc_stops, stops, dc = np.empty((4, num_mcus * len(plan)), np.int64)
    if not kernels.walk(bits, first_bits, mcus, plan, rows, starts, dc_stops, stops, dc, np.zeros(3, np.int64)):
        raise ValueError("a damaged scan")
    if np.abs(dc).max() > kernels.MAX_DC:
        raise ValueError("DC coefficients out of range")
    return Scan(tables, rows, plan, content[header.scan_at : end], bits, starts, dc_stops, stops, dc)


def new_head(
    content: bytes, header: JpegHeader, tables: dict[int, Huffman], extra: Sequence[tuple[int, bytes]]
) -> tuple[bytes, int]:
    """Return a header with those tables and extra segments (marker and content), and the offset of the extra segments.

    It has no restart interval, and keeps only the metadata that determines how colours are read.
    """
    head = bytearray(SOI)
    for part in header.parts[:-1]:
        is_metadata = part.marker == 0xFE or (0xE0 <= part.marker <= 0xEF and part.marker not in (JFIF, ADOBE))
        if not is_metadata and part.marker not in (DHT, DRI):
            head += _part(part.marker, content[part.start : part.stop])
    head += _part(DHT, tables_content(tables))
    extra_at = len(head)
    last = header.parts[-1]
    for marker, body in (*extra, (last.marker, content[last.start : last.stop])):
        head += _part(marker, body)
    return bytes(head), extra_at


def _part(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def _completed(content: bytes, header: JpegHeader) -> dict[int, Huffman]:
    """Return the header's tables, with a code for every size in those for DC."""
    tables = read_tables(content, header.parts)
    for component in header.components:
        if component.dc_table not in tables or 16 + component.ac_table not in tables:
            raise ValueError("a Huffman table is missing")
        tables[component.dc_table] = completed(tables[component.dc_table])
    return tables


def _unstuffed(content: bytes, at: int) -> tuple[list[bytes], int]:
    """Return the scan's segments without markers and byte stuffing, and the offset of the file's end."""
    data = np.frombuffer(content, np.uint8, offset=at)
    ones = np.flatnonzero(data[:-1] == 0xFF)
    markers = ones[data[ones + 1] != 0]
    pieces, start = [], at
    for position in markers.tolist():
        marker = int(data[position + 1])
        piece = content[start : at + position].replace(b"\xff\x00", b"\xff")
        if marker == EOI[1]:
            return [*pieces, piece], at + position + 2
        if marker != RST0 + len(pieces) % 8:
            break
        pieces.append(piece)
        start = at + position + 2
    raise ValueError("the scan does not end with the file")
