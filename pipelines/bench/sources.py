"""Time and peak memory of preparing many small objects and of reading large shards; results in docs/data-sources.md.

    export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...
    python -m pipelines.bench.sources write-objects s3://bucket/objects 60000
    python -m pipelines.bench.sources prepare s3://bucket/objects s3://bucket/prepared
    python -m pipelines.bench.sources write-shards s3://bucket/large 10        # GB
    python -m pipelines.bench.sources read-shards s3://bucket/large 8192       # rows a window

Each step is a separate command, so that a peak belongs to one step. Objects that exist are not written again.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mae_core.config import AugmentConfig
from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig, PrepareConfig
from pipelines.dataset.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from pipelines.feed.building import feed
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.prepare import prepare
from pipelines.prepare.shards import SCHEMA
from pipelines.storage import Storage, open_storage

IMAGE_BYTES, ROWS_PER_GROUP, ROWS_PER_SHARD = 110_000, 256, 4096


@contextmanager
def peaks(what: str) -> Iterator[None]:
    """Print, when the block ends, its duration and the peak memory of this process and its descendants."""
    peaks_kib: dict[tuple[str, int], int] = {}
    done, start_s = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(0.25):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                record_peak(peaks_kib, process.pid)

    threading.Thread(target=watch, daemon=True).start()
    yield
    record_peak(peaks_kib, os.getpid())
    done.set()
    print(f"{what}: {time.monotonic() - start_s:.0f} s")
    kinds: dict[str, list[int]] = {}
    for (kind, _), peak_kib in peaks_kib.items():
        kinds.setdefault(kind, []).append(peak_kib // 1024)
    for kind, found in sorted(kinds.items()):
        print(f"  {kind}: {len(found)} processes, largest peaks {', '.join(map(str, sorted(found)[-4:]))} MiB")


def record_peak(peaks_kib: dict[tuple[str, int], int], pid: int) -> None:
    """Record the peak memory of a process by (kind, pid). The kernel tracks it (VmHWM), so polling is enough."""
    try:
        status, words = Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/cmdline").read_bytes()
        peak_kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    except OSError:
        return
    kind = "driver" if pid == os.getpid() else "Ray's workers" if words.startswith(b"ray::") else "Ray itself"
    peaks_kib[kind, pid] = max(peak_kib, peaks_kib.get((kind, pid), 0))


def write_objects(uri: str, count: int) -> None:
    """Write `count` small PNG files of noise in 100 class folders."""
    storage = open_storage(uri)
    existing = {path for path, _ in storage.walk()}

    def put(number: int) -> None:
        path = f"class{number % 100:03d}/{number:06d}.png"
        if path not in existing:
            file = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            storage.write(path, file.getvalue())

    with ThreadPoolExecutor(32) as pool, peaks(f"{count:,} objects written"):
        for first in range(0, count, 1000):
            list(pool.map(put, range(first, min(count, first + 1000))))


def prepare_objects(source: str, out: str) -> None:
    with peaks(f"{source} prepared"):
        manifest = prepare(source, out, PrepareConfig())
    print(f"  {manifest.num_ok:,} images in {sum(len(s.shards) for s in manifest.splits.values())} shards")


def write_shards(uri: str, gigabytes: float) -> None:
    """Write shards as `prepare` does, of tiny JPEGs padded with noise, so that reading them costs no decoding."""
    storage, file = open_storage(uri), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file, "JPEG")
    count = max(1, round(gigabytes * 1e9 / IMAGE_BYTES / ROWS_PER_SHARD))
    existing = {path for path, _ in storage.walk()}
    with ThreadPoolExecutor(2) as pool, peaks(f"{count} shards written"):
        list(pool.map(lambda n: write_shard(storage, shard_path(n), file.getvalue(), n, existing), range(count)))
    sizes = dict(storage.walk())
    shards = [
        Shard(path=shard_path(n), num_rows=ROWS_PER_SHARD, num_bytes=sizes[shard_path(n)], sha256="0" * 64,
              first_id=n * ROWS_PER_SHARD, rows_per_group=ROWS_PER_GROUP) for n in range(count)
    ]  # fmt: skip
    rows, num_bytes = count * ROWS_PER_SHARD, sum(shard.num_bytes for shard in shards)
    manifest = Manifest(
        channels=3, image_px=None, classes=[], splits={"train": Split(num_rows=rows, num_bytes=num_bytes, shards=shards)},  # noqa: E501
        num_found=rows, num_ok=rows, num_quarantined=0, num_duplicates=0, quarantine_reasons={}, mean=[0.5] * 3,
        std=[0.2] * 3, config={}, source_digest="",
    )  # fmt: skip
    write_manifest(storage, manifest)
    print(f"  {num_bytes / 1e9:.2f} GB in {count} shards, {rows:,} images")


def shard_path(number: int) -> str:
    return f"train/part-{number:05d}.parquet"


def write_shard(storage: Storage, path: str, jpeg: bytes, seed: int, existing: set[str]) -> None:
    """Write one shard, unless it exists; noise pads every JPEG to `IMAGE_BYTES`."""
    if path in existing:
        return
    noise, other = np.random.default_rng(seed), [[value] * ROWS_PER_GROUP for value in (0, 16, 16, 1, None, "x")]
    with (
        storage.create(path) as file,
        pq.ParquetWriter(file, SCHEMA, compression="NONE", use_dictionary=False) as writer,
    ):
        for _ in range(ROWS_PER_SHARD // ROWS_PER_GROUP):
            images = [jpeg + noise.bytes(IMAGE_BYTES - len(jpeg)) for _ in range(ROWS_PER_GROUP)]
            columns = [pa.array(c, kind) for c, kind in zip([images, *other], SCHEMA.types)]
            writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))


def read_shards(uri: str, window: int) -> None:
    """Read one epoch as a rank with two data tasks does."""
    manifest, compute = read_manifest(open_storage(uri)), ComputeConfig(num_workers=1, data_tasks=2)
    plan = EpochPlan(
        index=Index.from_manifest(manifest, "train"), seed=0, batch=1024, micro_batch=64, num_workers=1, window=window
    )
    transform = Transform(train=True, image_px=(32, 32), channels=3, augment=AugmentConfig(), seed=0)
    segment = FeedSegment(dataset_uri=uri, plan=plan, transform=transform, first_step=0, last_step=plan.steps_per_epoch)
    with (
        peaks(f"{manifest.split('train').num_bytes / 1e9:.2f} GB read in windows of {window} rows"),
        ray_session(compute),
    ):
        count = sum(float(batch.weights.sum()) for batch in feed([segment], 1, max_tasks=2).micro_batches())
    print(f"  {count:,.0f} images")


def main() -> None:
    step, *words = sys.argv[1:]
    if step == "write-objects":
        write_objects(words[0], int(words[1]))
    elif step == "prepare":
        prepare_objects(words[0], words[1])
    elif step == "write-shards":
        write_shards(words[0], float(words[1]))
    elif step == "read-shards":
        read_shards(words[0], int(words[1]))
    else:
        sys.exit(f"no step {step!r}; see the docstring of this module")


if __name__ == "__main__":
    main()
