"""Find images with equal bytes. Their splits and positions alone decide which one is kept."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, SliceSummary
from pipelines.sources import SPLITS

# Number of digests compared at a time, so that memory does not grow with the dataset.
IMAGES_PER_PASS = 8_000_000
# Of equal images, the one in the first of these splits is kept, so that no test image was trained on.
_RANKS = np.full(256, len(SPLITS), dtype=np.uint8)
_RANKS[[SPLITS.index(name) for name in ("test", "val", "train")]] = range(3)


def duplicates(
    summaries: Callable[[], Iterable[SliceSummary]], num_images: int, images_per_pass: int = IMAGES_PER_PASS
) -> dict[int, frozenset[int]]:
    """Return, by slice, the positions of images whose bytes also occur in a preferred split or earlier in the listing.

    `summaries` yields those of all slices by ascending number; it is called once per pass. Each pass compares a range
    of digests.
    """
    num_passes = max(1, -(-num_images // images_per_pass))
    found: dict[int, set[int]] = {}
    for number in range(num_passes):
        for slice_number, position in _repeated(summaries(), number, num_passes):
            found.setdefault(slice_number, set()).add(position)
    return {number: frozenset(positions) for number, positions in found.items()}


def _repeated(summaries: Iterable[SliceSummary], number: int, num_passes: int) -> Iterator[tuple[int, int]]:
    parts = [_selected(summary, number, num_passes) for summary in summaries]
    if not parts:
        return
    digests, ranks, slices, positions = (np.concatenate(arrays) for arrays in zip(*parts))
    # lexsort is stable, so the listing's order breaks ties.
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    yield from zip(slices[order[same]].tolist(), positions[order[same]].tolist())


def _selected(summary: SliceSummary, number: int, num_passes: int) -> tuple[NDArray[np.generic], ...]:
    """Return digest, split rank, slice and position of the readable images whose digest falls into this pass."""
    digests = np.frombuffer(bytes(summary.digests), dtype=f"V{DIGEST_BYTES}").view(">u8").reshape(-1, 2)
    splits = np.frombuffer(bytes(summary.splits), dtype=np.uint8)
    mine = (splits != NO_SPLIT) & (digests[:, 0] % num_passes == number)
    positions = np.flatnonzero(mine)
    return digests[mine], _RANKS[splits[mine]], np.full(len(positions), summary.number), positions
