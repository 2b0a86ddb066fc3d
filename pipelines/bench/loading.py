"""Whole ways to training take turns: S3 shards through Ray Data, torch's DataLoader on a folder, and decoding alone."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from mae_core.config import AugmentConfig
from pipelines.bench.object_store import object_store
from pipelines.cluster import DATA_TASK_CPUS, ray_session
from pipelines.config import ComputeConfig, PrepareConfig
from pipelines.manifest import Manifest
from pipelines.plan import EpochPlan, Index
from pipelines.prepare import prepare
from pipelines.windows import Segment, Transform, window_micro_batches

log = logging.getLogger(__name__)

_MICRO_BATCH = 50
_EPOCHS = 6
_WINDOW_ROWS = 250
_IMAGE_PX = (224, 224)


@dataclass(frozen=True)
class _Passage:
    """When each batch of a few epochs arrived, in seconds from the request for the first."""

    arrivals_s: list[float]
    batches_per_epoch: int
    store_cpu_s: float = 0.0
    """CPU seconds that the S3 server of this machine spent meanwhile."""

    @property
    def seconds(self) -> float:
        """From the first batch to the last."""
        return self.arrivals_s[-1] - self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.arrivals_s)]

    def epoch_gap_s(self) -> float:
        """The longest wait for the first batch of an epoch after the first."""
        return max(self.gaps_s[self.batches_per_epoch - 1 :: self.batches_per_epoch])

    def batch_gap_s(self) -> float:
        """The longest wait for another batch."""
        return max(gap for i, gap in enumerate(self.gaps_s, start=1) if i % self.batches_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The rates of every way, round by round, and how ours waits."""

    where: str
    cores: int
    rates: dict[str, list[float]]
    """Images a second by the wall clock, from the first batch on."""
    store_share: float
    """Share of the cores that the S3 server took on our way, which elsewhere is not on them."""
    first_batch_s: float
    epoch_gap_s: float
    batch_gap_s: float

    def images_per_s(self, name: str) -> float:
        return median(self.rates[name])

    def spread(self, name: str) -> float:
        return (max(self.rates[name]) - min(self.rates[name])) / median(self.rates[name])

    def ratio(self, other: str) -> float:
        """Our rate over another's, by the median over rounds."""
        return median(a / b for a, b in zip(self.rates["ray"], self.rates[other]))

    @property
    def share_of_bare(self) -> float:
        """Our rate over that of bare decoding on the cores without what the S3 server takes of them."""
        return self.ratio("bare") / (1 - self.store_share)

    def figures(self) -> dict[str, Any]:
        return {
            "cores": self.cores,
            "images_per_s": self.images_per_s("ray"),
            "ratio_vs_dataloader": self.ratio("dataloader"),
            "share_of_bare_decode": self.share_of_bare,
            "share_of_bare_decode_with_store": self.ratio("bare"),
            "store_share": self.store_share,
            "first_batch_s": self.first_batch_s,
            "epoch_gap_s": self.epoch_gap_s,
            "batch_gap_s": self.batch_gap_s,
            "loading_spread": {name: self.spread(name) for name in self.rates},
        }


def measure_loading(images: Sequence[bytes], folder: Path, cores: int, epoch_images: int, rounds: int) -> Loading:
    """A few epochs by each way in turn, `rounds` times; workers of each are started and warm before the clock is.

    All processes of all ways, the S3 server included, share the same `cores`.
    """
    _write_images(images, folder / "images", epoch_images)
    compute = ComputeConfig(num_workers=1, data_tasks=cores + 1)
    (folder / "store").mkdir()
    with only_cores(cores), object_store(folder / "store") as (bucket, store_cpu_s), ray_session(compute):
        uri, small = f"{bucket}/shards", folder / "local"
        config = PrepareConfig(rows_per_shard=_WINDOW_ROWS, rows_per_group=50, val_fraction=0.0)
        manifest = prepare(str(folder / "images"), uri, config)
        prepare(str(folder / "images"), str(small), config)
        batches = -(-manifest.num_ok // _MICRO_BATCH)
        ways = _ways(_segment(uri, manifest), _segment(str(small), manifest), folder / "images", cores, batches)
        passages: dict[str, list[_Passage]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                before_s = store_cpu_s()
                passage = _timed(way(), batches)
                passage = replace(passage, store_cpu_s=store_cpu_s() - before_s)
                log.info("%s: %.0f images/s", name, _rate(name, passage, manifest.num_ok))
                # The first round warms all workers.
                passages[name] += [passage] if number else []
    _pool(cores).shutdown()
    for cached in (_pool, _loader):
        cached.cache_clear()
    ours = passages["ray"]
    return Loading(
        where="S3 on this machine",
        cores=cores,
        rates={name: [_rate(name, passage, manifest.num_ok) for passage in found] for name, found in passages.items()},
        store_share=median(passage.store_cpu_s / passage.arrivals_s[-1] / cores for passage in ours),
        first_batch_s=median(passage.arrivals_s[0] for passage in ours),
        epoch_gap_s=median(passage.epoch_gap_s() for passage in ours),
        batch_gap_s=median(passage.batch_gap_s() for passage in ours),
    )


@contextmanager
def only_cores(count: int) -> Iterator[None]:
    """The processes that are started in the block have so many cores. Raises ValueError where there are fewer."""
    if not hasattr(os, "sched_setaffinity"):  # macOS: they have all
        yield
        return
    before = os.sched_getaffinity(0)
    if count > len(before):
        raise ValueError(f"cores {count} is more than the {len(before)} that this process may use")
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _rate(name: str, passage: _Passage, epoch_images: int) -> float:
    """Images a second from the first batch on; of bare decoding, whose batches come a window at a time, over all."""
    if name == "bare":
        return _EPOCHS * epoch_images / passage.arrivals_s[-1]
    return (_EPOCHS * epoch_images - _MICRO_BATCH) / passage.seconds


def _timed(batches: Iterator[Any], batches_per_epoch: int) -> _Passage:
    started, arrivals = time.perf_counter(), []
    for _ in batches:
        arrivals.append(time.perf_counter() - started)
    return _Passage(arrivals, batches_per_epoch)


def _write_images(images: Sequence[bytes], folder: Path, count: int) -> None:
    """Files in one class folder, the images again and again, each with its number in a comment: no two are equal."""
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        content = images[number % len(images)]
        comment = number.to_bytes(8, "big")
        if content.startswith(b"\xff\xd8"):
            content = content[:2] + b"\xff\xfe\x00\x0a" + comment + content[2:]
            (folder / "all" / f"{number:07d}.jpg").write_bytes(content)
        else:
            (folder / "all" / f"{number:07d}.png").write_bytes(content + comment)


def _segment(uri: str, manifest: Manifest) -> Segment:
    plan = EpochPlan(
        index=Index.from_manifest(manifest, "train"),
        seed=0,
        batch=_MICRO_BATCH,
        micro_batch=_MICRO_BATCH,
        num_workers=1,
        window=_WINDOW_ROWS,
    )
    transform = Transform(train=True, image_px=_IMAGE_PX, channels=3, augment=AugmentConfig(), seed=0)
    return Segment(
        dataset_uri=uri, plan=plan, transform=transform, first_step=0, last_step=_EPOCHS * plan.steps_per_epoch
    )


def _ways(
    stored: Segment, local: Segment, folder: Path, cores: int, batches_per_epoch: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    return {
        "ray": lambda: _ray_batches(stored, cores),
        "dataloader": lambda: _dataloader_batches(folder, cores),
        "bare": lambda: _bare_batches(local, cores, batches_per_epoch),
    }


def _ray_batches(segment: Segment, cores: int) -> Iterator[Any]:
    from pipelines.ingest import feed, micro_batches

    # One more than cores: see DATA_TASK_CPUS.
    yield from micro_batches(feed([segment], 1, cores + 1, DATA_TASK_CPUS).iterator())


def _dataloader_batches(folder: Path, cores: int) -> Iterator[Any]:
    """As the reference implementation loads; its workers stay for all epochs of a passage."""
    loader = _loader(folder, cores)
    for _ in range(_EPOCHS):
        yield from loader


@lru_cache(maxsize=1)
def _loader(folder: Path, cores: int) -> Any:
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                _IMAGE_PX, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    return DataLoader(
        ImageFolder(str(folder), transform),
        batch_size=_MICRO_BATCH,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
        # Threads of Ray and of S3 run here: a forked process could wait for ever for a lock that one of them holds.
        multiprocessing_context="spawn",
    )


def _bare_batches(segment: Segment, cores: int, batches_per_epoch: int) -> Iterator[Any]:
    """The same windows, read from local shards and decoded by as many processes, with nothing behind them."""
    pool = _pool(cores)
    for num_batches in pool.map(_decode_window, [segment] * segment.num_windows, range(segment.num_windows)):
        yield from range(num_batches)


@lru_cache(maxsize=1)
def _pool(cores: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _decode_window(segment: Segment, window: int) -> int:
    return sum(1 for _ in window_micro_batches(segment, segment.first_window + window))
