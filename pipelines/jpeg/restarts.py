"""A JPEG becomes the same JPEG with restart markers: not one coefficient changes, so that pixels are bit-identical.

Between blocks only the DC code at the start of a segment says something of what was before it. So the Huffman codes
are walked to find where blocks begin, the first DC of each plane in each segment is coded anew, and all other bits are
copied. Progressive files, and those of several scans, are left as they are.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.jpeg import ADOBE, DHT, DRI, EOI, JFIF, RST0, SOI, SOS, JpegHeader, read_header
from pipelines.jpeg.huffman import STANDARD_DC, Huffman, table_part
from pipelines.jpeg.scan import Scan, blocks_of, read_scan

MAX_GROWTH = 0.02
# A marker, half a byte of padding and longer DC codes; the estimate that picks the first interval to try.
_SEGMENT_BYTES = 4


def with_restarts(content: bytes) -> tuple[bytes, NDArray[np.int32]] | None:
    """The file with restart markers, and the offsets of its segments with its length last.

    The interval is the shortest that divides a row of MCUs and lets the file grow by at most MAX_GROWTH; None where
    there is none, and for a file that is no whole sequential JPEG of one scan. Metadata is dropped: read the
    orientation first.
    """
    try:
        header = read_header(content)
        scan = read_scan(content, header)
    except (ValueError, IndexError):
        return None
    budget = MAX_GROWTH * len(content)
    for interval in _divisors(header.mcus_per_row):
        num_segments = header.mcu_rows * (header.mcus_per_row // interval)
        if num_segments > 1 and num_segments * _SEGMENT_BYTES <= budget:
            found = _rewritten(content, header, scan, interval)
            if found is not None and len(found[0]) - len(content) <= budget:
                return found
    return None


def _divisors(number: int) -> Iterator[int]:
    return (k for k in range(1, number + 1) if number % k == 0)


def _rewritten(content: bytes, header: JpegHeader, scan: Scan, interval: int) -> tuple[bytes, NDArray[np.int32]] | None:
    """The file with a restart marker every `interval` MCUs; None where a DC difference has no code."""
    plan = np.array(blocks_of(header))
    starts_segment = np.arange(len(scan.is_restart)) % interval == 0
    differences = _differences(scan.dc, plan, starts_segment)
    is_first = np.append(True, plan[1:] != plan[:-1])
    anew = np.flatnonzero((starts_segment | scan.is_restart)[:, None] & is_first)
    tables = [scan.dc_tables[component.dc_table] for component in header.components]
    coded = _coded(differences[anew], plan[anew % len(plan)], tables)
    replaced = coded is None
    if coded is None:
        anew = np.arange(len(differences))
        coded = _coded(differences, plan[anew % len(plan)], [STANDARD_DC] * len(tables))
    if coded is None:
        return None
    opens = starts_segment[anew // len(plan)] & (anew % len(plan) == 0)
    segments = _segments(scan, anew, *coded, opens)
    head = _head(content, header, interval, replaced)
    marked = [segment + bytes([0xFF, RST0 + i % 8]) for i, segment in enumerate(segments[:-1])]
    marked.append(segments[-1] + EOI)
    offsets = len(head) + np.cumsum([0, *map(len, marked)])
    return head + b"".join(marked), offsets.astype(np.int32)


def _differences(
    dc: NDArray[np.int64], plan: NDArray[np.int64], starts_segment: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """What each block's DC code has to say: the step from the block before of its plane, or from 0 in a new segment."""
    by_mcu = dc.reshape(-1, len(plan))
    found = np.empty_like(by_mcu)
    for component in sorted(set(plan.tolist())):
        columns = np.flatnonzero(plan == component)
        plane = by_mcu[:, columns]
        steps = np.diff(plane.reshape(-1), prepend=0).reshape(plane.shape)
        steps[starts_segment, 0] = plane[starts_segment, 0]
        found[:, columns] = steps
    return found.reshape(-1)


def _coded(
    differences: NDArray[np.int64], components: NDArray[np.int64], tables: Sequence[Huffman]
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """DC codes with the bits that follow them, and how many bits each is; None where a table lacks one."""
    sizes = np.frexp(np.abs(differences).astype(np.float64))[1].astype(np.int64)
    if sizes.max() > 11:
        return None
    codes = np.stack([table.codes for table in tables])[components, sizes]
    lengths = np.stack([table.code_lengths for table in tables])[components, sizes]
    if not lengths.all():
        return None
    extra = np.where(differences < 0, differences + (1 << sizes) - 1, differences)
    return codes << sizes | extra, lengths + sizes


def _segments(
    scan: Scan,
    anew: NDArray[np.int64],
    codes: NDArray[np.int64],
    lengths: NDArray[np.int64],
    opens: NDArray[np.bool_],
) -> list[bytes]:
    """The segments' bytes, stuffed. Bits come in threes: a block's new DC code, what is copied from there to the next
    such block, and ones up to a whole byte where a segment ends."""
    copied = scan.stops[np.append(anew[1:], len(scan.starts)) - 1] - scan.dc_stops[anew]
    first = np.flatnonzero(opens)
    num_bits = np.add.reduceat(lengths + copied, first)
    padding = np.zeros_like(copied)
    padding[np.append(first[1:], len(anew)) - 1] = -num_bits % 8
    # One pool of bits: the source's, then 32 of each new code, then ones.
    new_bits = np.unpackbits((codes << (32 - lengths)).astype(">u4").view(np.uint8))
    pool = np.concatenate([scan.bits, new_bits, np.ones(8, np.uint8)])
    new_at = len(scan.bits) + 32 * np.arange(len(anew))
    ones_at = np.full_like(new_at, len(pool) - 8)
    sources = np.stack([new_at, scan.dc_stops[anew], ones_at], axis=1).reshape(-1)
    counts = np.stack([lengths, copied, padding], axis=1).reshape(-1)
    shifts = sources - (np.cumsum(counts) - counts)
    packed = np.packbits(pool[np.arange(counts.sum()) + np.repeat(shifts, counts)]).tobytes()
    stops = np.cumsum(-(-num_bits // 8)).tolist()
    return [packed[a:b].replace(b"\xff", b"\xff\x00") for a, b in zip([0, *stops], stops)]


def _head(content: bytes, header: JpegHeader, interval: int, replaced: bool) -> bytes:
    """The header with the restart interval and without metadata, but for what decides how colours are read."""
    kept = [SOI]
    for part in header.parts:
        body = content[part.start : part.stop]
        is_metadata = part.marker == 0xFE or (0xE0 <= part.marker <= 0xEF and part.marker not in (JFIF, ADOBE))
        if part.marker == SOS:
            if replaced:
                numbers = sorted({component.dc_table for component in header.components})
                kept += [_part(DHT, table_part(number)) for number in numbers]
            kept.append(_part(DRI, interval.to_bytes(2, "big")))
        if not is_metadata and part.marker != DRI:
            kept.append(_part(part.marker, body))
    return b"".join(kept)


def _part(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
