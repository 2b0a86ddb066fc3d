"""Prints what many small objects and large shards cost in memory: docs/data-sources.md.

AWS_ENDPOINT_URL=http://127.0.0.1:9000 python infra/measure_sources.py s3://bucket/prefix [objects] [gigabytes]
"""

import contextlib
import io
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines import cluster
from pipelines import prepare as module
from pipelines.config import PrepareConfig
from pipelines.prepare.shards import SCHEMA
from pipelines.storage import open_storage


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(what: str, start_s: float) -> None:
    print(f"{what}: {time.monotonic() - start_s:.1f} s, peak {peak_mb():.0f} MiB", flush=True)


def small_objects(root: str, count: int) -> None:
    """Written, listed and prepared in this process, which is a driver and a task at once."""
    storage = open_storage(f"{root}/images")

    def put(number: int) -> None:
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        storage.write(f"class{number % 100:03d}/{number:06d}.png", file.getvalue())

    start_s = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, count, 1000):
            list(pool.map(put, range(first, min(count, first + 1000))))
    say(f"{count:,} objects written", start_s)
    start_s = time.monotonic()
    found = sum(1 for _ in storage.walk())
    say(f"{found:,} listed", start_s)
    cluster.ray_session = lambda compute: contextlib.nullcontext()
    module._run = lambda todo, *rest: (module.write_one(row["number"], row["skip"], *rest) for row in todo)
    start_s = time.monotonic()
    manifest = module.prepare(storage.uri, f"{root}/prepared", PrepareConfig())
    say(f"{manifest.num_ok:,} prepared into {sum(len(s.shards) for s in manifest.splits.values())} shards", start_s)


def large_shards(root: str, num_bytes: int) -> None:
    """Written as `prepare` writes them, read as training does."""
    storage, block = open_storage(f"{root}/large"), np.random.default_rng(0).bytes(2**27)
    shard_bytes, image_bytes, per_group = 2**29, 110_000, 256
    start_s, draw = time.monotonic(), np.random.default_rng(1)
    for number in range(num_bytes // shard_bytes):
        with storage.create(f"part-{number:05d}.parquet") as file, pq.ParquetWriter(
            file, SCHEMA, compression="NONE", use_dictionary=False
        ) as writer:
            for _ in range(shard_bytes // image_bytes // per_group):
                images = [block[at : at + image_bytes] for at in draw.integers(0, 2**27 - image_bytes, per_group)]
                other = [[0] * per_group] * 4 + [[None] * per_group, ["x"] * per_group]
                columns = [pa.array(c, kind) for c, kind in zip([images, *other], SCHEMA.types)]
                writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
    written = sum(size for _, size in storage.walk())
    say(f"{written / 1e9:.2f} GB of shards written", start_s)
    start_s, found = time.monotonic(), 0
    for path, _ in storage.list():
        with storage.open_input(path) as source, pq.ParquetFile(source) as file:
            for group in range(file.num_row_groups):
                found += file.read_row_group(group, columns=["image"], use_threads=False).nbytes
    say(f"{found / 1e9:.2f} GB read back", start_s)


def main() -> None:
    print(f"at start: peak {peak_mb():.0f} MiB")
    if int(sys.argv[2]):
        small_objects(sys.argv[1], int(sys.argv[2]))
    if float(sys.argv[3]):
        large_shards(sys.argv[1], int(float(sys.argv[3]) * 1e9))


if __name__ == "__main__":
    main()
