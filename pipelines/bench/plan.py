"""Cost of the epoch plan at a billion images, and how well its windows mix; results in docs/data-sources.md.

python -m pipelines.bench.plan [images]                  the plan alone, and mixing
python -m pipelines.bench.plan feed [images [epochs]]    the first micro-batches of a run, through Ray
"""

import io
import itertools
import resource
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mae_core.config import AugmentConfig
from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig
from pipelines.dataset.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from pipelines.feed.building import feed
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.prepare.shards import SCHEMA
from pipelines.sources.entry import Entry
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import open_storage

ROWS_PER_SHARD = 8192
ROWS_PER_GROUP = 256
SIDE_PX = 28


def manifest_of(num_images: int, rows_per_group: int) -> Manifest:
    """Build the manifest of a dataset whose shards do not exist."""
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
    """Print CPU seconds and memory of the index and of planning windows."""
    manifest = manifest_of(num_images, 256)
    before_mb, start_s = peak_mb(), time.process_time()
    index = Index.from_manifest(manifest, "train")
    index_s = time.process_time() - start_s
    arrays = (index.shard, index.group, index.first_id, index.num_rows)
    plan = plan_of(index, 8192)
    start_s = time.process_time()
    reads = plan.window_reads(0, 0, np.arange(64))
    first_s = time.process_time() - start_s
    start_s = time.process_time()
    plan.window_reads(0, plan.windows_per_epoch // 2, np.arange(64))
    next_s = time.process_time() - start_s
    start_s = time.process_time()
    plan.window_reads(1, 0, np.arange(64))
    epoch_s = time.process_time() - start_s
    print(f"{num_images:,} images, {len(index.group):,} row groups, {len(manifest.splits['train'].shards):,} shards")
    print(f"  index {index_s:.2f} s, {sum(a.nbytes for a in arrays) / 2**20:.0f} MiB")
    print(
        f"  first micro-batch planned after {first_s:.2f} s ({len(reads)} reads), any other window "
        f"{next_s * 1e3:.1f} ms"
    )
    print(f"  another epoch {epoch_s:.2f} s; peak {peak_mb() - before_mb:.0f} MiB above the manifest's {before_mb:.0f}")


def write_dataset(folder: Path, num_images: int) -> None:
    """Write a dataset of images of noise in which every shard is a link to the same file."""
    noise = np.random.default_rng(0).integers(0, 256, (ROWS_PER_SHARD, SIDE_PX, SIDE_PX), np.uint8)
    images = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append(file.getvalue())
    columns = [images, *([value] * ROWS_PER_SHARD for value in (0, SIDE_PX, SIDE_PX, 1, None, "x"))]
    table = pa.Table.from_arrays([pa.array(c, kind) for c, kind in zip(columns, SCHEMA.types)], schema=SCHEMA)
    pq.write_table(table, folder / "shard.parquet", row_group_size=ROWS_PER_GROUP)
    (folder / "train").mkdir()
    manifest = manifest_of(num_images, ROWS_PER_GROUP)
    for shard in manifest.splits["train"].shards:
        (folder / shard.path).symlink_to(folder / "shard.parquet")
    write_manifest(open_storage(str(folder)), manifest)


def first_batches(num_images: int, epochs: int) -> None:
    """Print the wall-clock time of each part of a run up to its first micro-batch, then the rate, and peak memory."""
    num_images -= num_images % ROWS_PER_SHARD  # Every link is a full shard.
    with tempfile.TemporaryDirectory() as name, ray_session(ComputeConfig(num_workers=1, data_tasks=2)):
        folder = Path(name)
        write_dataset(folder, num_images)
        laps = [time.perf_counter()]
        manifest = read_manifest(open_storage(name))
        laps.append(time.perf_counter())
        index = Index.from_manifest(manifest, "train")
        plan = EpochPlan(index=index, seed=0, batch=4096, micro_batch=64, num_workers=1, window=8192)
        transform = Transform(
            train=True, image_px=(SIDE_PX, SIDE_PX), channels=1, augment=AugmentConfig(), seed=0
        )  # fmt: skip
        steps = epochs * plan.steps_per_epoch
        segment = FeedSegment(dataset_uri=name, plan=plan, transform=transform, first_step=0, last_step=steps)
        laps.append(time.perf_counter())
        for _ in feed([replace(segment, last_step=min(steps, 16))], 1, max_tasks=2).micro_batches():
            pass  # Warm-up: Ray starts its workers.
        start_s, arrivals_s = time.perf_counter(), []
        for batch in itertools.islice(feed([segment], 1, max_tasks=2).micro_batches(), 8192 // 64 * 16):
            arrivals_s.append(time.perf_counter() - start_s)
            assert batch.weights.all()
        rate = 64 * (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])
        print(
            f"{num_images:,} images, {epochs} epochs: {segment.num_windows:,} windows, "
            f"{len(manifest.splits['train'].shards):,} shards"
        )
        print(
            f"  manifest of {(folder / 'manifest.json').stat().st_size / 2**20:.0f} MiB read in "
            f"{laps[1] - laps[0]:.2f} s, plan and index {laps[2] - laps[1]:.2f} s"
        )
        print(f"  first micro-batch {arrivals_s[0]:.2f} s after a feed began, then {rate:,.0f} images/s")
        sizes_mb = sorted(p.memory_info().rss / 2**20 for p in psutil.Process().children(recursive=True))[-3:]
        largest = ", ".join(f"{size_mb:.0f}" for size_mb in reversed(sizes_mb))
        print(f"  peak of the driver {peak_mb():.0f} MiB; largest processes of Ray {largest} MiB")


def mixing(
    num_images: int, num_classes: int, rows_per_group: int, window: int, batch: int = 4096, mixed: bool = False
) -> None:
    """Print how well an epoch of class-sorted input is mixed.

    The columns are the rank correlation of storage order and visiting order, the median number of distinct classes in
    a batch, and the mean total-variation distance of a batch's class shares from uniform. Samples are stored in order
    of their class, as `prepare` keeps images of tar and Parquet files, or `mixed`, as it orders separate files.
    """
    plan = plan_of(Index.from_manifest(manifest_of(num_images, rows_per_group), "train"), window, batch)
    ids = np.concatenate([plan.window_ids(0, w) for w in range(plan.windows_per_epoch)])
    # Both are permutations, so this is the rank correlation.
    correlation = np.corrcoef(np.arange(len(ids)), ids)[0, 1]
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
    print(
        f"  {'mixed' if mixed else 'sorted':>6} {rows_per_group:>14} {window:>8} {window // rows_per_group:>11} "
        f"{correlation:>12.4f} {distinct:>8.0f} {distance:>9.2f}"
    )


def main() -> None:
    if sys.argv[1:2] == ["feed"]:
        numbers = [int(word) for word in sys.argv[2:]]
        first_batches(*(numbers + [1_000_000_000, 1][len(numbers) :]))
        return
    cost(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000_000)
    n, classes = 1_281_167, 1000
    print(f"class-sorted, {n:,} images of {classes} classes, batch 4096")
    print("  stored rows_per_group   window  groups/win  correlation  classes  distance")
    for rows_per_group, window in (
        (256, 8192),
        (256, 32768),
        (256, 131072),
        (256, 524288),
        (64, 8192),
        (64, 32768),
        (64, 131072),
        (1, 8192),
    ):
        mixing(n, classes, rows_per_group, window)
    mixing(n, classes, 256, 8192, mixed=True)


if __name__ == "__main__":
    main()
