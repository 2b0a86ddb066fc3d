"""End-to-end loaders of `mae bench data`: shards in S3 through Ray Data, DataLoader on files, and bare decoding."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mae_core.config import AugmentConfig
from mae_core.errors import UserError
from pipelines.cluster import DATA_TASK_CPUS
from pipelines.dataset.manifest import Manifest
from pipelines.feed.micro_batch import window_micro_batches
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform

MICRO_BATCH = 64
EPOCHS = 3
# A quarter of the default, so that a few epochs of a few seconds have enough windows.
WINDOW_SAMPLES = 2048
_IMAGE_PX = (224, 224)


@contextmanager
def only_cores(count: int) -> Iterator[None]:
    """Restrict processes started in the block to `count` cores. Raises UserError if there are fewer.

    macOS cannot restrict them; there they may use all cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if count > len(before):
        raise UserError(f"cores {count} is more than the {len(before)} that this process may use")
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def write_images(images: Sequence[bytes], folder: Path, count: int) -> None:
    """Write `count` files to one class folder, repeating the images. A number in each file makes its bytes unique."""
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        content = images[number % len(images)]
        comment = number.to_bytes(8, "big")
        if content.startswith(b"\xff\xd8"):
            content = content[:2] + b"\xff\xfe\x00\x0a" + comment + content[2:]
            (folder / "all" / f"{number:07d}.jpg").write_bytes(content)
        else:
            (folder / "all" / f"{number:07d}.png").write_bytes(content + comment)


def segment_of(uri: str, manifest: Manifest) -> FeedSegment:
    """Return `EPOCHS` epochs of the training split as one segment, with the crops of pretraining."""
    plan = EpochPlan(
        index=Index.from_manifest(manifest, "train"),
        seed=0,
        batch=MICRO_BATCH,
        micro_batch=MICRO_BATCH,
        num_workers=1,
        window=WINDOW_SAMPLES,
    )
    transform = Transform(train=True, image_px=_IMAGE_PX, channels=3, augment=AugmentConfig(), seed=0)
    return FeedSegment(
        dataset_uri=uri, plan=plan, transform=transform, first_step=0, last_step=EPOCHS * plan.steps_per_epoch
    )


def variants(
    stored: FeedSegment, local: FeedSegment, folder: Path, cores: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Return the loaders by name; each call of one yields the batches of `EPOCHS` epochs.

    `stored` reads shards in S3, `local` the same shards on disk, and `folder` holds the images as files.
    """
    return {
        "ray": lambda: _ray_batches(stored, cores),
        "dataloader": lambda: _dataloader_batches(folder, cores),
        "bare": lambda: _bare_batches(local, cores),
    }


def _ray_batches(segment: FeedSegment, cores: int) -> Iterator[Any]:
    from pipelines.feed.building import feed

    # One more than cores: see DATA_TASK_CPUS.
    yield from feed([segment], 1, cores + 1, DATA_TASK_CPUS).micro_batches()


def _dataloader_batches(folder: Path, cores: int) -> Iterator[Any]:
    """Load as the reference implementation does, with workers that persist from pass to pass."""
    loader = _loader(folder, cores)
    for _ in range(EPOCHS):
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
        batch_size=MICRO_BATCH,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
        # Ray and the S3 client run threads here: a forked process could deadlock on a lock that one of them holds.
        multiprocessing_context="spawn",
    )


def _bare_batches(segment: FeedSegment, cores: int) -> Iterator[float]:
    """Read and decode the same windows from local shards in `cores` processes; yield the CPU seconds of each batch."""
    pool = _pool(cores)
    for batches_s in pool.map(_decode_window, [segment] * segment.num_windows, range(segment.num_windows)):
        yield from batches_s


def end_workers(cores: int) -> None:
    """End the worker processes that persist between passes."""
    _pool(cores).shutdown()
    for cached in (_pool, _loader):
        cached.cache_clear()


@lru_cache(maxsize=1)
def _pool(cores: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _decode_window(segment: FeedSegment, window: int) -> list[float]:
    stops = [time.process_time()]
    stops += [time.process_time() for _ in window_micro_batches(segment, segment.first_window + window)]
    return [b - a for a, b in pairwise(stops)]
