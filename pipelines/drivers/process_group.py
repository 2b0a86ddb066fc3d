"""How Ray Train joins the workers of a group in torch's process group.

It does what Ray's own `TorchConfig` does for gloo and NCCL, but imports torch in the workers alone. TorchConfig also
imports it in the driver and in Train's controller, which takes each of them seconds before a worker starts.
"""

import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

from ray.train.backend import Backend, BackendConfig

T = TypeVar("T")

_LEAVING_S = 30.0
"""Time for workers to leave the process group, before they are ended anyway."""


def gather(value: T) -> list[T]:
    """Return the value of every worker of the group, which is pickled, in rank order; every worker must call it."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return [value]
    if dist.get_backend() == "nccl":
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())  # on which NCCL gathers
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@dataclass
class ProcessGroup(BackendConfig):
    """The process group of a worker group: its backend, and how long a collective may wait for other workers."""

    backend: Literal["gloo", "nccl"]
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what joins the workers; Ray Train's controller calls it."""
        return _Joining

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for Ray's records of the run."""
        return asdict(self)


class _Joining(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Join all workers; rank 0 names the address."""
        import ray

        assert isinstance(backend_config, ProcessGroup)
        address = worker_group.execute_single(0, _address)
        world = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, backend_config, address, rank, world)
                for rank in range(world)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let the workers leave, if they still answer."""
        import ray

        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=_LEAVING_S)


def _address() -> tuple[str, int]:
    """Return this node's address and a port of it that is free."""
    import ray

    with socket.socket() as server:
        server.bind(("", 0))
        return ray.util.get_node_ip_address(), server.getsockname()[1]


def _join(group: ProcessGroup, address: tuple[str, int], rank: int, world: int) -> None:
    """Join this worker; waits until all have."""
    import torch.distributed as dist

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address[0], str(address[1])
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
    dist.init_process_group(
        group.backend, init_method="env://", rank=rank, world_size=world, timeout=timedelta(seconds=group.timeout_s)
    )


def _leave() -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
