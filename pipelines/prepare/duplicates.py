"""Find images with equal bytes. Their splits and positions alone decide which one is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, SliceSummary
from pipelines.sources import SPLITS

# Number of digests compared at a time, so that memory does not grow with the dataset.
IMAGES_PER_PASS = 8_000_000
Place = tuple[int, int]
"""Number of a slice, and position in it."""
Duplicates: TypeAlias = dict[int, dict[int, Place]]
"""By slice, the position of every duplicate, with the image that is kept in its stead."""
# Of equal images, the one in the first of these splits is kept, so that no test image was trained on.
_RANKS = np.full(256, len(SPLITS), dtype=np.uint8)
_RANKS[[SPLITS.index(name) for name in ("test", "val", "train")]] = range(3)


def duplicates(
    summaries: Callable[[], Iterable[SliceSummary]], num_images: int, images_per_pass: int = IMAGES_PER_PASS
) -> Duplicates:
    """Return, by slice, the positions of images whose bytes also occur in a preferred split or earlier in the listing.

    With each comes the place of the image that is kept in its stead. `summaries` yields those of all slices by
    ascending number; it is called once per pass. Each pass compares a range of digests.
    """
    num_passes = max(1, -(-num_images // images_per_pass))
    found: Duplicates = {}
    for number in range(num_passes):
        for (slice_number, position), kept in _repeated(summaries(), number, num_passes):
            found.setdefault(slice_number, {})[position] = kept
    return found


def relabelled(
    found: Mapping[int, Mapping[int, Place]], labels_of: Callable[[int], list[int]]
) -> list[tuple[Place, Place]]:
    """Return the duplicates that have another label than the image that is kept, each with that image.

    `labels_of` returns the labels of a slice, -1 for none; an unlabelled duplicate says nothing else.
    """
    wanted: dict[int, set[int]] = {}
    for number, positions in found.items():
        for position, (kept, kept_position) in positions.items():
            wanted.setdefault(number, set()).add(position)
            wanted.setdefault(kept, set()).add(kept_position)
    label: dict[Place, int] = {}
    for number in sorted(wanted):
        labels = labels_of(number)
        label |= {(number, position): labels[position] for position in wanted[number]}
    pairs = [((n, position), kept) for n in sorted(found) for position, kept in sorted(found[n].items())]
    return [(place, kept) for place, kept in pairs if label[place] not in (-1, label[kept])]


def _repeated(summaries: Iterable[SliceSummary], number: int, num_passes: int) -> Iterator[tuple[Place, Place]]:
    parts = [_selected(summary, number, num_passes) for summary in summaries]
    if not parts:
        return
    digests, ranks, slices, positions = (np.concatenate(arrays) for arrays in zip(*parts))
    # lexsort is stable, so the listing's order breaks ties.
    order = np.lexsort((ranks, digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    # Of a run of equal digests the first is kept.
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    kept = order[starts[same]]
    yield from zip(
        zip(slices[order[same]].tolist(), positions[order[same]].tolist()),
        zip(slices[kept].tolist(), positions[kept].tolist()),
    )


def _selected(summary: SliceSummary, number: int, num_passes: int) -> tuple[NDArray[np.generic], ...]:
    """Return digest, split rank, slice and position of the readable images whose digest falls into this pass."""
    digests = np.frombuffer(bytes(summary.digests), dtype=f"V{DIGEST_BYTES}").view(">u8").reshape(-1, 2)
    splits = np.frombuffer(bytes(summary.splits), dtype=np.uint8)
    mine = (splits != NO_SPLIT) & (digests[:, 0] % num_passes == number)
    positions = np.flatnonzero(mine)
    return digests[mine], _RANKS[splits[mine]], np.full(len(positions), summary.number), positions
