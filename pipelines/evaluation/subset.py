"""The fixed images of an evaluation while pretraining, a pure function of a dataset and a seed.

1. Shuffle the row groups of the split by the seed, and the rows within each.
2. Of every class, take its first images in this order: as few row groups as possible are read, since all classes share
   the order of row groups. A whole row group is read for one image of it.
"""

from dataclasses import dataclass

import numpy as np

from mae_core.errors import UserError
from mae_core.randomness import Purpose, hash64_numpy
from pipelines.dataset.manifest import Manifest
from pipelines.feed.plan import Ids, Index
from pipelines.storage import Storage


@dataclass(frozen=True, eq=False, kw_only=True)
class Subset:
    """The images on which a probe is fitted, and those that test it."""

    fitted: Index
    held_out: Index | None
    """None without labels, or if no class has two images to choose from."""
    held_out_split: str
    """Split of the held-out images: val, or train if there is no val; empty if there are none."""


def choose_subset(manifest: Manifest, storage: Storage, num_images: int, *, seed: int) -> Subset:
    """Choose at most `num_images` training images, as many of each class, and at most as many held-out ones.

    Held-out images are of val or, if it is absent or empty, training images that are not among the first; of a class
    with few images half are held out. Without labels, or with several classes an image, choose training images alone.
    Reads the label columns. Raises UserError if `num_images` is below one per class.
    """
    check_num_images(manifest, num_images)
    train = Index.from_manifest(manifest, "train")
    if not manifest.has_single_labels:
        return Subset(fitted=training_images(manifest, num_images, seed=seed), held_out=None, held_out_split="")
    num_classes = len(manifest.classes)
    per_class = num_images // num_classes
    ids, counts = _by_class(train, storage, num_classes, seed)
    starts = np.cumsum(counts) - counts
    if "val" in manifest.splits and manifest.splits["val"].num_rows:
        split, index, num_fitted = "val", Index.from_manifest(manifest, "val"), np.minimum(counts, per_class)
        held_out_ids, held_out_counts = _by_class(index, storage, num_classes, seed)
        held_out_starts = np.cumsum(held_out_counts) - held_out_counts
        num_held_out = np.minimum(held_out_counts, per_class)
    else:
        split, index, held_out_ids = "train", train, ids
        num_held_out = np.minimum(counts // 2, per_class)
        num_fitted = np.minimum(counts - num_held_out, per_class)
        held_out_starts = starts + num_fitted
    held_out = index.only(_runs(held_out_ids, held_out_starts, num_held_out)) if num_held_out.any() else None
    return Subset(
        fitted=train.only(_runs(ids, starts, num_fitted)), held_out=held_out, held_out_split=split if held_out else ""
    )


def training_images(manifest: Manifest, num_images: int, *, seed: int) -> Index:
    """Choose at most `num_images` training images, whatever their labels."""
    train = Index.from_manifest(manifest, "train")
    ids = np.concatenate([first + np.arange(rows) for first, rows in zip(train.first_id, train.num_rows)])
    return train.only(_shuffled(train, ids, np.zeros_like(ids), seed)[:num_images])


def check_num_images(manifest: Manifest, num_images: int) -> None:
    """Raise UserError if a labelled dataset has more classes than images are asked for."""
    num_classes = len(manifest.classes) if manifest.has_single_labels else 1
    if num_images < num_classes:
        raise UserError(
            f"evaluate.images {num_images} is below one for each of the {num_classes} classes; try {10 * num_classes}"
        )


def _by_class(index: Index, storage: Storage, num_classes: int, seed: int) -> tuple[Ids, Ids]:
    """Return the labelled ids by class and then in the shuffled order, and the number of ids of each class."""
    ids, labels = index.labels(storage)
    shuffled = _shuffled(index, ids, labels, seed)
    return shuffled[np.count_nonzero(labels < 0) :], np.bincount(labels[labels >= 0], minlength=num_classes)


def _shuffled(index: Index, ids: Ids, labels: Ids, seed: int) -> Ids:
    """Sort all ids of the index by label, then by the hash of their row group, then by their own."""
    of_group = hash64_numpy(seed, Purpose.EVALUATE, 0, index.first_id).repeat(index.num_rows)
    return ids[np.lexsort((hash64_numpy(seed, Purpose.EVALUATE, 1, ids), of_group, labels))]


def _runs(ids: Ids, starts: Ids, counts: Ids) -> Ids:
    """Return the concatenation of ids[start : start + count] over all starts and counts."""
    return np.concatenate([ids[start : start + count] for start, count in zip(starts, counts)])
