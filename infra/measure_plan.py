"""Prints what the epoch plan costs at a billion images, and how well its windows mix: docs/data-sources.md.

python infra/measure_plan.py [images]
"""

import resource
import sys
import time
from contextlib import closing

import numpy as np

from pipelines.manifest import Manifest, Shard, Split
from pipelines.plan import EpochPlan, Index
from pipelines.sources.entry import Entry
from pipelines.sources.sorting import SortedEntries

ROWS_PER_SHARD = 8192


def manifest_of(num_images: int, rows_per_group: int) -> Manifest:
    """A dataset of so many rows, without a file."""
    shards = [
        Shard(
            path=f"train/part-{i:05d}.parquet",
            num_rows=min(ROWS_PER_SHARD, num_images - first),
            num_bytes=1,
            first_id=first,
            sha256="0" * 64,
            rows_per_group=rows_per_group,
        )
        for i, first in enumerate(range(0, num_images, ROWS_PER_SHARD))
    ]
    return Manifest(
        channels=3, image_px=None, classes=[], splits={"train": Split(num_rows=num_images, num_bytes=1, shards=shards)},
        num_found=num_images, num_ok=num_images, num_quarantined=0, num_duplicates=0, quarantine_reasons={},
        mean=[0.5] * 3, std=[0.2] * 3, config={}, source_digest="",
    )  # fmt: skip


def plan_of(index: Index, window: int, batch: int = 4096) -> EpochPlan:
    return EpochPlan(index=index, seed=0, batch=batch, micro_batch=64, num_workers=8, window=window)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(num_images: int) -> None:
    manifest = manifest_of(num_images, 256)
    before_mb, start_s = peak_mb(), time.process_time()
    index = Index.from_manifest(manifest, "train")
    index_s = time.process_time() - start_s
    arrays = (index.shard, index.group, index.first_id, index.num_rows)
    plan = plan_of(index, 8192)
    start_s = time.process_time()
    reads = plan.window_reads(0, 0, range(64))
    first_s = time.process_time() - start_s
    start_s = time.process_time()
    plan.window_reads(0, plan.windows_per_epoch // 2, range(64))
    next_s = time.process_time() - start_s
    start_s = time.process_time()
    plan.window_reads(1, 0, range(64))
    epoch_s = time.process_time() - start_s
    print(f"{num_images:,} images, {len(index.group):,} row groups, {len(manifest.splits['train'].shards):,} shards")
    print(f"  index {index_s:.2f} s, {sum(a.nbytes for a in arrays) / 2**20:.0f} MiB")
    print(f"  first micro-batch planned after {first_s:.2f} s ({len(reads)} reads), any other window {next_s * 1e3:.1f} ms")
    print(f"  another epoch {epoch_s:.2f} s; peak {peak_mb() - before_mb:.0f} MiB above the manifest's {before_mb:.0f}")


def mixing(
    num_images: int, num_classes: int, rows_per_group: int, window: int, batch: int = 4096, mixed: bool = False
) -> None:
    """Storage order against visiting order, and classes in a batch of class-sorted input: stored as it comes, as images
    within larger files are, or `mixed`, as files of their own are."""
    plan = plan_of(Index.from_manifest(manifest_of(num_images, rows_per_group), "train"), window, batch)
    ids = np.concatenate([plan.window_ids(0, w) for w in range(plan.windows_per_epoch)])
    correlation = np.corrcoef(np.arange(len(ids)), ids)[0, 1]  # of ranks: both are permutations
    stored = np.arange(num_images) * num_classes // num_images
    if mixed:
        names = (f"{label}/{number}.jpg" for number, label in enumerate(stored))
        with closing(SortedEntries(Entry(name, name, label=name.split("/")[0]) for name in names)) as entries:
            stored = np.array([int(entry.label) for entry in entries])
    labels = stored[ids]
    batches = labels[: len(labels) // batch * batch].reshape(-1, batch)
    distinct = np.median([len(np.unique(row)) for row in batches])
    shares = [np.bincount(row, minlength=num_classes) / batch for row in batches]
    distance = np.mean([np.abs(share - 1 / num_classes).sum() / 2 for share in shares])
    print(f"  {'mixed' if mixed else 'sorted':>6} {rows_per_group:>14} {window:>8} {window // rows_per_group:>11} {correlation:>12.4f} {distinct:>8.0f} {distance:>9.2f}")


def main() -> None:
    cost(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000_000)
    n, classes = 1_281_167, 1000
    print(f"class-sorted, {n:,} images of {classes} classes, batch 4096")
    print("  stored rows_per_group   window  groups/win  correlation  classes  distance")
    for rows_per_group, window in ((256, 8192), (256, 32768), (256, 131072), (256, 524288), (64, 8192), (64, 32768), (64, 131072), (1, 8192)):
        mixing(n, classes, rows_per_group, window)
    mixing(n, classes, 256, 8192, mixed=True)


if __name__ == "__main__":
    main()
