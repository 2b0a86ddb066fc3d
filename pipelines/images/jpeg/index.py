"""A JPEG gets an index of its tiles, in its header: by it the part under a crop becomes a JPEG of its own.

A tile is some MCUs of a row. Of each the index has the bits that it takes in the file, stuffing included, and every
component's DC coefficient at its end, which the next block's is coded from. The entropy-coded data stay as they are.

The index is a part APP9 of the header: MAE1, CRC-32 of what follows, MCUs a tile (two bytes), for each field the size
of its remainders (a byte), then tile by tile each field's number as a Rice code: what it differs by from that of the
tile above, in the first row from that of the tile before.
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
    """The file with an index, and where that begins and ends.

    Tiles are the smallest that let the file grow by at most MAX_GROWTH; None where none do, and for a file that is no
    whole sequential JPEG of one scan. Metadata and restart markers are dropped: read the orientation first.
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
        # Each number takes a bit at least.
        if num_tiles * (1 + len(header.components)) > 8 * most_bytes:
            continue
        numbers = _numbers(header, scan, tile_mcus)
        num_bits = _lengths(numbers, _remainders(numbers)).sum()
        if kernels.INDEX_HEAD + numbers.shape[1] + -(-num_bits // 8) <= most_bytes:
            return indexed(content, header, scan, tile_mcus)
    return None


def indexed(content: bytes, header: JpegHeader, scan: Scan, tile_mcus: int) -> tuple[bytes, tuple[int, int]]:
    """The file with an index of tiles of so many MCUs, and where that begins and ends."""
    numbers = _numbers(header, scan, tile_mcus)
    remainders = _remainders(numbers)
    body = tile_mcus.to_bytes(2, "big") + bytes(remainders) + _rice_codes(numbers, remainders)
    body = INDEX_NAME + zlib.crc32(body).to_bytes(4, "big") + body
    head, start = new_head(content, header, scan.tables, [(_APP9, body)])
    return head + scan.stuffed, (start, start + 4 + len(body))


def _without_restarts(content: bytes) -> tuple[bytes, JpegHeader, Scan]:
    """The file, its header and its scan, written anew where it has restart markers."""
    header = read_header(content)
    scan = read_scan(content, header)
    if not header.restart_interval:
        return content, header, scan
    content, _ = rewritten(content, header, scan, None)
    header = read_header(content)
    return content, header, read_scan(content, header)


def _numbers(header: JpegHeader, scan: Scan, tile_mcus: int) -> NDArray[np.int64]:
    """The index's numbers [tiles fields]: bits and DC coefficients, less those of the tile above or before."""
    num_mcus, per_row = header.mcu_rows * header.mcus_per_row, header.mcus_per_row
    firsts = np.arange(num_mcus).reshape(-1, per_row)[:, ::tile_mcus]
    tiles_per_row, blocks = firsts.shape[1], len(scan.plan)
    bits = np.append(scan.starts[firsts.reshape(-1) * blocks], scan.stops[-1])
    # Bits of the file: each byte of ones before them is followed by a zero.
    ones = np.flatnonzero(scan.bits == 0xFF)
    places = bits + 8 * np.searchsorted(ones, bits >> 3)
    last_mcus = np.append(firsts.reshape(-1)[1:], num_mcus) - 1
    last_blocks = [np.flatnonzero(scan.plan[:, 0] == i)[-1] for i in range(len(header.components))]
    dc = scan.dc.reshape(-1, blocks)[last_mcus][:, last_blocks]
    numbers = np.column_stack([np.diff(places), dc])
    found = numbers.copy()
    found[1:tiles_per_row] -= numbers[: tiles_per_row - 1]
    found[tiles_per_row:] -= numbers[:-tiles_per_row]
    # The sign goes to the lowest bit.
    return np.where(found < 0, -2 * found - 1, 2 * found)


def _remainders(numbers: NDArray[np.int64]) -> list[int]:
    """Of each field the bits of a number that its code has as they are, so that all its codes are shortest."""
    found = []
    for field in numbers.T:
        least = int(field.max() // (kernels.MAX_QUOTIENT + 1)).bit_length()
        guess = int(field.mean()).bit_length()
        sizes = range(max(least, guess - 2), max(least, guess) + 1)
        found.append(min(sizes, key=lambda size: int((field >> size).sum()) + size * len(field)))
    return found


def _lengths(numbers: NDArray[np.int64], remainders: list[int]) -> NDArray[np.int64]:
    """Bits of each number's code."""
    return (numbers >> remainders) + 1 + remainders


def _rice_codes(numbers: NDArray[np.int64], remainders: list[int]) -> bytes:
    """Row by row: as many ones as what lies above the remainder says, a zero, the remainder."""
    ones = (1 << (numbers >> remainders)) - 1
    codes = ones << (np.array(remainders) + 1) | numbers & (1 << np.array(remainders)) - 1
    lengths = _lengths(numbers, remainders).reshape(-1)
    padded = np.unpackbits((codes.reshape(-1) << (64 - lengths)).astype(">u8").view(np.uint8)).reshape(-1, 64)
    return np.packbits(padded[np.arange(64) < lengths[:, None]]).tobytes()
