"""CPUs and GPUs that this process may use. Imports nothing of ours."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def num_cores() -> int:
    """Return the CPUs that this process may use: by its affinity and by the CPU limits of its control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, int(min(cpu_limits(), default=affinity))))


def cpu_limits(root: Path = Path("/")) -> Iterator[float]:
    """Yield the CPU limits of this process's control groups and of those above them; nothing where none is set.

    A container sees its own group as the root of the hierarchy, whatever /proc calls it. So names that do not exist
    are skipped, and the root is always read.
    """
    groups = root / "proc/self/cgroup"
    if not groups.is_file():
        return
    for line in groups.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / name.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield from _limit(group)


def _limit(group: Path) -> Iterator[float]:
    """Yield the limit of one control group, in CPUs: cpu.max of version 2, or the two files of version 1."""
    files = [group / "cpu.max"], [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
    for names in files:
        if all(name.is_file() for name in names):
            quota, period = " ".join(name.read_text() for name in names).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def has_gpu_driver(dev: Path = Path("/dev")) -> bool:
    """Return whether this system may have a GPU for torch, without importing torch, which takes seconds.

    On Linux the driver of NVIDIA, of AMD or of WSL has a device file; elsewhere torch must be asked.
    """
    return sys.platform != "linux" or any((dev / name).exists() for name in ("nvidiactl", "kfd", "dxg"))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a command may use: this machine, or a cluster as a whole."""

    num_cores: int
    num_gpus: int = 0
    gpu: str = ""
    """Name of the GPUs; empty if there is none."""
    gpu_bytes: int = 0
    """Memory of the smallest GPU; 0 if it is not known."""
    has_bfloat16: bool = False
    """Whether every GPU computes in bfloat16."""
    is_cluster: bool = False

    def share(self, num_groups: int) -> "Machine":
        """Return what each of several worker groups that run at a time may use: at least a core, and a GPU if any."""
        gpus = max(1, self.num_gpus // num_groups) if self.num_gpus else 0
        return dataclasses.replace(self, num_cores=max(1, self.num_cores // num_groups), num_gpus=gpus)


def this_machine() -> Machine:
    """Describe this machine, without taking memory on its GPUs."""
    if not has_gpu_driver():
        return Machine(num_cores=num_cores())
    import torch

    if not torch.cuda.is_available():
        return Machine(num_cores=num_cores())
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Machine(
        num_cores=num_cores(),
        num_gpus=len(found),
        gpu=" and ".join(sorted({gpu.name for gpu in found})),
        gpu_bytes=min(gpu.total_memory for gpu in found),
        # Since Ampere.
        has_bfloat16=all(gpu.major >= 8 for gpu in found),
    )
