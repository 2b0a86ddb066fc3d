"""One rank of a worker group: its device, its collectives, and its stream of micro-batches."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import ComputeConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.stages import stage
from pipelines.worker.goodput import Clock

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process's position in its worker group, and the collectives, which every rank must call.

    With one rank the collectives do nothing.
    """

    index: int
    world: int
    device: torch.device
    compute: ComputeConfig
    sees_preemptions: bool = False
    """Whether Ray Train announces the preemption of a node."""

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def agree(self, value: T) -> T:
        """Broadcast rank 0's value, which is pickled; return it on every rank."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over ranks in place; return it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in rank order. All must have the same shape."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return found

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        if self.world > 1:
            dist.barrier()

    def is_preemption_announced(self) -> bool:
        """Return whether the preemption of one of the group's nodes is announced.

        Every rank must call it. It takes milliseconds.
        """
        if not self.sees_preemptions:
            return False
        import ray.train

        return ray.train.get_preemption_info() is not None

    def log(self, logger: logging.Logger, message: str, *args: object) -> None:
        """Log the message on rank 0."""
        if self.is_main:
            logger.info(message, *args)

    def stage(self, what: str) -> AbstractContextManager[None]:
        """Return a context in which rank 0 says what it waits for if that takes long (`pipelines.stages`)."""
        return stage(what) if self.is_main else nullcontext()

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass computes in `compute.precision`."""
        dtype = torch.bfloat16 if self.compute.precision == "bfloat16" else torch.float32
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Move the model to this rank's device, compile it if configured, and wrap it in DDP unless world is 1."""
        model = model.to(self.device)
        if self.compute.compile is True:
            model.compile(dynamic=False)
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=self.compute.bucket_mib
        )
        if self.compute.reduce_in == "bfloat16":
            parallel.register_comm_hook(None, bf16_compress_hook)
        return parallel


class Feed:
    """The rank's stream of micro-batches, taken step by step; each micro-batch must belong to the expected step."""

    def __init__(
        self,
        batches: Iterator[MicroBatch],
        enter_step: Callable[[], None] = lambda: None,
        is_held: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the micro-batches from `batches`; `enter_step` is called before each step and may end the work.

        `is_held` returns whether it will, or may, as the ranks of the group agree.
        """
        self._batches = batches
        self.enter_step, self.is_held = enter_step, is_held
        self.clock = Clock()
        """Clock of the current job; waiting for data counts on it."""

    def take(self, step: int, count: int) -> Iterator[MicroBatch]:
        """Yield this rank's `count` micro-batches of a step."""
        self.enter_step()
        for _ in range(count):
            with self.clock.spent("data"):
                batch = next(self._batches, None)
            assert batch is not None, f"the feed ended before step {step}"
            assert batch.step == step, f"the feed is at step {batch.step}, the training state at {step}"
            yield batch


def join_group(compute: ComputeConfig) -> Rank:
    """Return this process's rank in Ray Train's worker group, after setting threads, determinism and CUDA device."""
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
        sees_preemptions=os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0",
    )


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients accumulate on this rank and DDP does not average them over ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model
