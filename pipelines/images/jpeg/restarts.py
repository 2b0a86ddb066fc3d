"""Rewrite a JPEG with other restart markers. No coefficient changes, so its pixels are bit-identical.

Only DC codes depend on earlier blocks. So the Huffman codes are walked to find the blocks, DC codes are written anew,
and all other bits are copied. Progressive files and files of several scans are not rewritten.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.images.jpeg import DRI, JpegHeader, kernels, read_header
from pipelines.images.jpeg.scan import Scan, new_head, read_scan

MAX_GROWTH = 0.02
# Estimated cost of a segment, to pick the first interval to try: a marker, half a byte of padding, longer DC codes.
_SEGMENT_BYTES = 4
# Largest growth of a block, if each begins a segment: a DC code, padding and a marker, with byte stuffing.
_BLOCK_BYTES = 16


def with_restarts(content: bytes) -> tuple[bytes, NDArray[np.int32]] | None:
    """Return the file with restart markers, and the offsets of its segments followed by its length.

    The interval is the shortest that divides a row of MCUs and lets the file grow by at most MAX_GROWTH. Returns None
    if there is none, or if the file is not an intact sequential JPEG of one scan. Metadata is dropped, so read the
    orientation first.
    """
    try:
        header = read_header(content)
        scan = read_scan(content, header)
        budget = MAX_GROWTH * len(content)
        for interval in (k for k in range(1, header.mcus_per_row + 1) if header.mcus_per_row % k == 0):
            num_segments = header.mcu_rows * (header.mcus_per_row // interval)
            if num_segments > 1 and num_segments * _SEGMENT_BYTES <= budget:
                result = rewritten(content, header, scan, interval)
                if len(result[0]) - len(content) <= budget:
                    return result
    except ValueError:
        pass
    return None


def rewritten(content: bytes, header: JpegHeader, scan: Scan, interval: int | None) -> tuple[bytes, NDArray[np.int32]]:
    """Return the file with a restart marker every `interval` MCUs, or without any, and its segment offsets and length.

    Raises ValueError if a DC difference is too large for a code.
    """
    num_mcus = header.mcu_rows * header.mcus_per_row
    extra = [(DRI, interval.to_bytes(2, "big"))] if interval else []
    head, _ = new_head(content, header, scan.tables, extra)
    offsets = np.empty(-(-num_mcus // (interval or num_mcus)), np.int64)
    out = np.empty(2 * len(scan.bits) + _BLOCK_BYTES * len(scan.dc) + kernels.SPARE_BYTES, np.uint8)
    blocks, last = (scan.dc_stops, scan.stops, scan.dc), np.zeros(3, np.int64)
    length = kernels.rewrite(scan.bits, scan.plan, scan.rows, *blocks, interval or num_mcus, out, offsets, last)
    if length == kernels.DAMAGED:
        raise ValueError("DC coefficients out of range")
    return head + out[:length].tobytes(), (len(head) + np.append(offsets, length)).astype(np.int32)
