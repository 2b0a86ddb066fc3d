"""Measure the loaders of `variants`, interleaved: throughput, waits, and the S3 server's share of the CPU."""

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
from pipelines.bench.variants import (
    EPOCHS,
    MICRO_BATCH,
    WINDOW_SAMPLES,
    end_workers,
    only_cores,
    segment_of,
    variants,
    write_images,
)
from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig, PrepareConfig
from pipelines.prepare import prepare

log = logging.getLogger(__name__)

_MAX_WARM_UP_PASSES = 6
_SETTLED_RATIO = 1.05


@dataclass(frozen=True)
class _Pass:
    """One pass of a loader over a few epochs."""

    arrivals_s: list[float]
    """Arrival of each batch, in seconds from the request for the first."""
    batches_per_epoch: int
    store_cpu_s: float = 0.0
    """CPU seconds of the S3 server on this machine."""
    cpu_s: float = 0.0
    """CPU seconds of all other processes; in bare decoding, of the decoding alone."""

    @property
    def seconds(self) -> float:
        """Seconds from the first batch to the last."""
        return self.arrivals_s[-1] - self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.arrivals_s)]

    def epoch_gap_s(self) -> float:
        """Return the longest wait for the first batch of an epoch, except the first epoch."""
        return max(self.gaps_s[self.batches_per_epoch - 1 :: self.batches_per_epoch])

    def batch_gap_s(self) -> float:
        """Return the longest wait for a batch within an epoch."""
        return max(gap for i, gap in enumerate(self.gaps_s, start=1) if i % self.batches_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Throughput of every loader by round, and the waits of ours."""

    where: str
    """Location of the shards, for the table."""
    cores: int
    rates: dict[str, list[float]]
    """Images/s by the wall clock, from the first batch on."""
    cpu_rates: dict[str, list[float]]
    """Images per CPU second of all processes except the S3 server."""
    store_share: float
    """Share of the cores that the S3 server takes while our loader runs; in production it runs on other machines."""
    first_batch_s: float
    epoch_gap_s: float
    batch_gap_s: float

    def images_per_s(self, name: str) -> float:
        return median(self.rates[name])

    def spread(self, name: str) -> float:
        return (max(self.rates[name]) - min(self.rates[name])) / median(self.rates[name])

    def ratio(self, other: str) -> float:
        """Return our rate relative to another loader's: the median of the rounds' ratios."""
        return median(a / b for a, b in zip(self.rates["ray"], self.rates[other]))

    @property
    def share_of_bare(self) -> float:
        """Our rate relative to bare decoding, both per CPU second: the median of the rounds' ratios."""
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
    """Time a few epochs of each loader in turn, `rounds` times, after warm-up passes of each.

    All processes, including the S3 server, share the same `cores`. `folder` holds files and shards.
    """
    write_images(images, folder / "images", epoch_images)
    compute = ComputeConfig(num_workers=1, data_tasks=cores + 1)
    (folder / "store").mkdir()
    with only_cores(cores), object_store(folder / "store") as (bucket, store_cpu_s), ray_session(compute):
        uri, small = f"{bucket}/shards", folder / "local"
        config = PrepareConfig(rows_per_shard=WINDOW_SAMPLES, val_fraction=0.0)
        manifest = prepare(str(folder / "images"), uri, config)
        prepare(str(folder / "images"), str(small), config)
        batches = -(-manifest.num_ok // MICRO_BATCH)
        loaders = variants(segment_of(uri, manifest), segment_of(str(small), manifest), folder / "images", cores)
        passes: dict[str, list[_Pass]] = {name: [] for name in loaders}
        for loader in loaders.values():
            _warm_up(loader, batches)
        for _ in range(rounds):
            for name, loader in loaders.items():
                store_s, all_s = store_cpu_s(), _cpu_s()
                one_pass = _timed(loader(), batches)
                store_s, all_s = store_cpu_s() - store_s, _cpu_s() - all_s
                one_pass = replace(one_pass, store_cpu_s=store_s, cpu_s=one_pass.cpu_s or all_s - store_s)
                log.info("%s: %.0f images/s", name, _rate(name, one_pass, manifest.num_ok))
                passes[name].append(one_pass)
    end_workers(cores)
    ours = passes["ray"]
    return Loading(
        where="S3 on this machine",
        cores=cores,
        rates={name: [_rate(name, one_pass, manifest.num_ok) for one_pass in found] for name, found in passes.items()},
        cpu_rates={
            name: [EPOCHS * manifest.num_ok / one_pass.cpu_s for one_pass in found] for name, found in passes.items()
        },
        store_share=median(one_pass.store_cpu_s / one_pass.arrivals_s[-1] / cores for one_pass in ours),
        first_batch_s=median(one_pass.arrivals_s[0] for one_pass in ours),
        epoch_gap_s=median(one_pass.epoch_gap_s() for one_pass in ours),
        batch_gap_s=median(one_pass.batch_gap_s() for one_pass in ours),
    )


def _rate(name: str, one_pass: _Pass, epoch_images: int) -> float:
    """Return images/s from the first batch on; of bare decoding, whose batches come by window, over the whole pass."""
    if name == "bare":
        return EPOCHS * epoch_images / one_pass.arrivals_s[-1]
    return (EPOCHS * epoch_images - MICRO_BATCH) / one_pass.seconds


def _warm_up(loader: Callable[[], Iterator[Any]], batches_per_epoch: int) -> None:
    """Run passes until one is no faster than the one before.

    Workers start in the first pass. Later ones touch shared memory that a virtual machine gets from its host on first
    use only.
    """
    before_s = inf
    for _ in range(_MAX_WARM_UP_PASSES):
        seconds = _timed(loader(), batches_per_epoch).arrivals_s[-1]
        log.info("warm-up pass: %.1f s", seconds)
        if seconds * _SETTLED_RATIO > before_s:
            return
        before_s = seconds


def _timed(batches: Iterator[Any], batches_per_epoch: int) -> _Pass:
    """Time the arrival of every batch.

    Bare decoding yields CPU seconds instead of batches, since idle processes of the other loaders must not count.
    """
    started, arrivals, cpu_s = time.perf_counter(), [], 0.0
    for batch in batches:
        arrivals.append(time.perf_counter() - started)
        cpu_s += batch if isinstance(batch, float) else 0.0
    return _Pass(arrivals, batches_per_epoch, cpu_s=cpu_s)


def _cpu_s() -> float:
    """Return the CPU seconds of this process and its live descendants."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))
