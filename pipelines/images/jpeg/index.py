"""Add an index of tiles to a JPEG's header, with which the part under a crop can be cut out as a JPEG of its own.

A tile is a number of consecutive MCUs in a row of MCUs. For each tile the index stores its length in bits in the file,
byte stuffing included, and every component's DC coefficient at its end, which the next block is coded relative to. The
entropy-coded data do not change.

The index is a segment APP9 of the header: MAE1, CRC-32 of the rest, MCUs per tile (two bytes), for each field the
number of remainder bits (one byte), then tile by tile each field's number as a Rice code. Numbers are differences from
the tile above, in the first row from the tile before.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from pipelines.images.jpeg import JpegHeader, kernels, read_header
from pipelines.images.jpeg.partial_decode import INDEX_NAME
from pipelines.images.jpeg.restarts import MAX_GROWTH, rewritten
from pipelines.images.jpeg.scan import Scan, new_head, read_scan

_APP9 = 0xE9
_MAX_PART_BYTES = 65_000


def with_index(content: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Return the file with an index, and the index's begin and end in it.

    Tiles are as small as possible while the file grows by at most MAX_GROWTH. Returns None if no size qualifies, or if
    the file is not an intact sequential JPEG of one scan. Metadata and restart markers are dropped, so read the
    orientation first.
    """
    limit_bytes = int((1 + MAX_GROWTH) * len(content))
    try:
        content, header, scan = _without_restarts(content)
    except ValueError:
        return None
    plain_bytes = len(new_head(content, header, scan.tables, [])[0]) + len(scan.stuffed)
    most_bytes = min(limit_bytes - plain_bytes, _MAX_PART_BYTES)
    for tile_mcus in range(1, header.mcus_per_row + 1):
        num_tiles = header.mcu_rows * -(-header.mcus_per_row // tile_mcus)
        # Each number takes at least one bit.
        if num_tiles * (1 + len(header.components)) > 8 * most_bytes:
            continue
        numbers = _numbers(header, scan, tile_mcus)
        num_bits = _lengths(numbers, _remainders(numbers)).sum()
        if kernels.INDEX_HEAD + numbers.shape[1] + -(-num_bits // 8) <= most_bytes:
            return indexed(content, header, scan, tile_mcus)
    return None


def indexed(content: bytes, header: JpegHeader, scan: Scan, tile_mcus: int) -> tuple[bytes, tuple[int, int]]:
    """Return the file with an index of tiles of `tile_mcus` MCUs, and the index's begin and end in it."""
    numbers = _numbers(header, scan, tile_mcus)
    remainders = _remainders(numbers)
    body = tile_mcus.to_bytes(2, "big") + bytes(remainders) + _rice_codes(numbers, remainders)
    body = INDEX_NAME + zlib.crc32(body).to_bytes(4, "big") + body
    head, start = new_head(content, header, scan.tables, [(_APP9, body)])
    return head + scan.stuffed, (start, start + 4 + len(body))


def _without_restarts(content: bytes) -> tuple[bytes, JpegHeader, Scan]:
    """Return the file, its header and its scan, rewritten without restart markers if it has any."""
    header = read_header(content)
    scan = read_scan(content, header)
    if not header.restart_interval:
        return content, header, scan
    content, _ = rewritten(content, header, scan, None)
    header = read_header(content)
    return content, header, read_scan(content, header)


def _numbers(header: JpegHeader, scan: Scan, tile_mcus: int) -> NDArray[np.int64]:
    """Return the index's numbers [tiles fields]: bits and DC coefficients, less those of the tile above or before."""
    num_mcus, per_row = header.mcu_rows * header.mcus_per_row, header.mcus_per_row
    firsts = np.arange(num_mcus).reshape(-1, per_row)[:, ::tile_mcus]
    tiles_per_row, blocks = firsts.shape[1], len(scan.plan)
    bits = np.append(scan.starts[firsts.reshape(-1) * blocks], scan.stops[-1])
    # Positions in the file: byte stuffing adds a zero byte after each 0xFF.
    ones = np.flatnonzero(scan.bits == 0xFF)
    positions = bits + 8 * np.searchsorted(ones, bits >> 3)
    last_mcus = np.append(firsts.reshape(-1)[1:], num_mcus) - 1
    last_blocks = [np.flatnonzero(scan.plan[:, 0] == i)[-1] for i in range(len(header.components))]
    dc = scan.dc.reshape(-1, blocks)[last_mcus][:, last_blocks]
    numbers = np.column_stack([np.diff(positions), dc])
    differences = numbers.copy()
    differences[1:tiles_per_row] -= numbers[: tiles_per_row - 1]
    differences[tiles_per_row:] -= numbers[:-tiles_per_row]
    # Zigzag: the sign becomes the lowest bit.
    return np.where(differences < 0, -2 * differences - 1, 2 * differences)


def _remainders(numbers: NDArray[np.int64]) -> list[int]:
    """Return the number of remainder bits per field that minimises the total length of its Rice codes."""
    remainders = []
    for field in numbers.T:
        least = int(field.max() // (kernels.MAX_QUOTIENT + 1)).bit_length()
        guess = int(field.mean()).bit_length()
        sizes = range(max(least, guess - 2), max(least, guess) + 1)
        remainders.append(min(sizes, key=lambda size: int((field >> size).sum()) + size * len(field)))
    return remainders


def _lengths(numbers: NDArray[np.int64], remainders: list[int]) -> NDArray[np.int64]:
    """Return the length in bits of each number's code."""
    return (numbers >> remainders) + 1 + remainders


def _rice_codes(numbers: NDArray[np.int64], remainders: list[int]) -> bytes:
    """Encode row by row: the quotient in unary (ones, then a zero), followed by the remainder."""
    ones = (1 << (numbers >> remainders)) - 1
    codes = ones << (np.array(remainders) + 1) | numbers & (1 << np.array(remainders)) - 1
    lengths = _lengths(numbers, remainders).reshape(-1)
    padded = np.unpackbits((codes.reshape(-1) << (64 - lengths)).astype(">u8").view(np.uint8)).reshape(-1, 64)
    return np.packbits(padded[np.arange(64) < lengths[:, None]]).tobytes()
