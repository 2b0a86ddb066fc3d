"""One rank of a worker group: its device, its share of the feed, and what it says to the others."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import ComputeConfig
from pipelines.feed.windows import MicroBatch
from pipelines.worker.goodput import Clock

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """Where this process stands. Rank checks are made here and nowhere else; every rank calls every collective."""

    index: int
    world: int
    device: torch.device
    compute: ComputeConfig
    watches: bool = False
    """Whether Ray Train says when a node is about to be taken away."""

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in rank order."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return found

    def barrier(self) -> None:
        """All ranks have come this far."""
        if self.world > 1:
            dist.barrier()

    def is_warned(self) -> bool:
        """A node of the group is about to be taken away; every rank calls it, which takes milliseconds."""
        if not self.watches:
            return False
        import ray.train

        return ray.train.get_preemption_info() is not None

    def log(self, logger: logging.Logger, message: str, *args: object) -> None:
        """Rank 0 logs the message."""
        if self.is_main:
            logger.info(message, *args)

    def autocast(self) -> torch.autocast:
        """The forward pass computes in the precision asked for."""
        dtype = torch.bfloat16 if self.compute.precision == "bfloat16" else torch.float32
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device under DDP (or bare where there is one rank), compiled if asked for."""
        model = model.to(self.device)
        if self.compute.compile:
            model.compile(dynamic=False)
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


class Feed:
    """The worker's stream of micro-batches, taken step by step; refuses one that is not the step asked for."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self.clock = Clock()
        """The clock of the job that is fed now."""

    def take(self, step: int, count: int) -> Iterator[MicroBatch]:
        """This rank's `count` micro-batches of a step."""
        for _ in range(count):
            with self.clock.spent("data"):
                batch = next(self._batches, None)
            assert batch is not None, f"the feed ended before step {step}"
            assert batch.step == step, f"the feed is at step {batch.step}, the training state at {step}"
            yield batch


def join_group(compute: ComputeConfig) -> Rank:
    """This process as a rank of Ray Train's group, with threads and determinism set."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(compute.threads)
    if compute.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Rank(
        index=context.get_world_rank(),
        world=context.get_world_size(),
        device=device,
        compute=compute,
        watches=os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0",
    )


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients accumulate on this rank without being averaged over the others."""
    from contextlib import nullcontext

    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def bare(model: nn.Module) -> nn.Module:
    """The model under DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model
