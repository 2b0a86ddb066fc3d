"""Whole ways to training take turns: S3 shards through Ray Data, torch's DataLoader on a folder, and decoding alone."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from pipelines.bench.object_store import object_store
from pipelines.bench.ways import (
    EPOCHS,
    MICRO_BATCH,
    WINDOW_ROWS,
    end_workers,
    only_cores,
    segment_of,
    ways,
    write_images,
)
from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig, PrepareConfig
from pipelines.prepare import prepare

log = logging.getLogger(__name__)

_MOST_WARM_PASSAGES = 6
_SETTLED = 1.05


@dataclass(frozen=True)
class _Passage:
    """When each batch of a few epochs arrived, in seconds from the request for the first."""

    arrivals_s: list[float]
    batches_per_epoch: int
    store_cpu_s: float = 0.0
    """CPU seconds that the S3 server of this machine spent meanwhile."""
    cpu_s: float = 0.0
    """CPU seconds of all other processes of this way, or of all decoding where that is all it does."""

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
    cpu_rates: dict[str, list[float]]
    """Images a CPU second of all processes but the S3 server: a second of a core that is used."""
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
        """Our rate over that of bare decoding, each by the cores that it uses, by the median over rounds."""
        return median(a / b for a, b in zip(self.cpu_rates["ray"], self.cpu_rates["bare"]))

    def figures(self) -> dict[str, Any]:
        return {
            "cores": self.cores,
            "images_per_s": self.images_per_s("ray"),
            "ratio_vs_dataloader": self.ratio("dataloader"),
            "share_of_bare_decode": self.share_of_bare,
            "wall_share_of_bare_decode": self.ratio("bare"),
            "images_per_core_s": median(self.cpu_rates["ray"]),
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
    write_images(images, folder / "images", epoch_images)
    compute = ComputeConfig(num_workers=1, data_tasks=cores + 1)
    (folder / "store").mkdir()
    with only_cores(cores), object_store(folder / "store") as (bucket, store_cpu_s), ray_session(compute):
        uri, small = f"{bucket}/shards", folder / "local"
        config = PrepareConfig(rows_per_shard=WINDOW_ROWS, val_fraction=0.0)
        manifest = prepare(str(folder / "images"), uri, config)
        prepare(str(folder / "images"), str(small), config)
        batches = -(-manifest.num_ok // MICRO_BATCH)
        contenders = ways(segment_of(uri, manifest), segment_of(str(small), manifest), folder / "images", cores)
        passages: dict[str, list[_Passage]] = {name: [] for name in contenders}
        for way in contenders.values():
            _warm(way, batches)
        for _ in range(rounds):
            for name, way in contenders.items():
                store_s, all_s = store_cpu_s(), _cpu_s()
                passage = _timed(way(), batches)
                store_s, all_s = store_cpu_s() - store_s, _cpu_s() - all_s
                passage = replace(passage, store_cpu_s=store_s, cpu_s=passage.cpu_s or all_s - store_s)
                log.info("%s: %.0f images/s", name, _rate(name, passage, manifest.num_ok))
                passages[name].append(passage)
    end_workers(cores)
    ours = passages["ray"]
    return Loading(
        where="S3 on this machine",
        cores=cores,
        rates={name: [_rate(name, passage, manifest.num_ok) for passage in found] for name, found in passages.items()},
        cpu_rates={
            name: [EPOCHS * manifest.num_ok / passage.cpu_s for passage in found] for name, found in passages.items()
        },
        store_share=median(passage.store_cpu_s / passage.arrivals_s[-1] / cores for passage in ours),
        first_batch_s=median(passage.arrivals_s[0] for passage in ours),
        epoch_gap_s=median(passage.epoch_gap_s() for passage in ours),
        batch_gap_s=median(passage.batch_gap_s() for passage in ours),
    )


def _rate(name: str, passage: _Passage, epoch_images: int) -> float:
    """Images a second from the first batch on; of bare decoding, whose batches come a window at a time, over all."""
    if name == "bare":
        return EPOCHS * epoch_images / passage.arrivals_s[-1]
    return (EPOCHS * epoch_images - MICRO_BATCH) / passage.seconds


def _warm(way: Callable[[], Iterator[Any]], batches_per_epoch: int) -> None:
    """Passages until one is hardly faster than the one before: workers start in the first, and what they and Ray share
    is memory that a virtual machine may get from its host only when it is touched."""
    before_s = inf
    for _ in range(_MOST_WARM_PASSAGES):
        seconds = _timed(way(), batches_per_epoch).arrivals_s[-1]
        log.info("warming: %.1f s", seconds)
        if seconds * _SETTLED > before_s:
            return
        before_s = seconds


def _timed(batches: Iterator[Any], batches_per_epoch: int) -> _Passage:
    """Bare decoding tells the CPU seconds of every batch, since what stands by beside it is none of its own."""
    started, arrivals, cpu_s = time.perf_counter(), [], 0.0
    for batch in batches:
        arrivals.append(time.perf_counter() - started)
        cpu_s += batch if isinstance(batch, float) else 0.0
    return _Passage(arrivals, batches_per_epoch, cpu_s=cpu_s)


def _cpu_s() -> float:
    """CPU seconds so far of this process and of all that it started and that live."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))
