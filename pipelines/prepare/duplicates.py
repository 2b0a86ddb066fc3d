"""Images of equal content: which of them stays is decided by their splits and places alone."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, SliceSummary
from pipelines.sources import SPLITS

# Digests that are compared at a time, so that memory does not grow with the dataset.
IMAGES_PER_PASS = 8_000_000
# Of equal images the one in the first of these splits stays, so that nothing that is tested was trained on.
_RANKS = np.full(256, len(SPLITS), dtype=np.uint8)
_RANKS[[SPLITS.index(name) for name in ("test", "val", "train")]] = range(3)


def duplicates(
    summaries: Callable[[], Iterable[SliceSummary]], num_images: int, images_per_pass: int = IMAGES_PER_PASS
) -> dict[int, frozenset[int]]:
    """By slice, the places of images whose bytes stand already in a split kept first, or earlier in the listing.

    `summaries` gives those of all slices by ascending number, once a pass; each pass looks at a range of digests.
    """
    num_passes = max(1, -(-num_images // images_per_pass))
    found: dict[int, set[int]] = {}
    for number in range(num_passes):
        for slice_number, place in _repeated(summaries(), number, num_passes):
            found.setdefault(slice_number, set()).add(place)
    return {number: frozenset(places) for number, places in found.items()}


def _repeated(summaries: Iterable[SliceSummary], number: int, num_passes: int) -> Iterator[tuple[int, int]]:
    parts = [_chosen(summary, number, num_passes) for summary in summaries]
    if not parts:
        return
    digests, ranks, slices, places = (np.concatenate(arrays) for arrays in zip(*parts))
    # lexsort is stable, so that the listing's order decides among equals.
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    yield from zip(slices[order[same]].tolist(), places[order[same]].tolist())


def _chosen(summary: SliceSummary, number: int, num_passes: int) -> tuple[NDArray[np.generic], ...]:
    """Digest, rank of the split, slice and place of whole images whose digest falls into this pass."""
    digests = np.frombuffer(bytes(summary.digests), dtype=f"V{DIGEST_BYTES}").view(">u8").reshape(-1, 2)
    splits = np.frombuffer(bytes(summary.splits), dtype=np.uint8)
    mine = (splits != NO_SPLIT) & (digests[:, 0] % num_passes == number)
    places = np.flatnonzero(mine)
    return digests[mine], _RANKS[splits[mine]], np.full(len(places), summary.number), places
