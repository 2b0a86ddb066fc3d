"""What a run makes of its GPU, for the metrics: share of the attainable rate, utilisation, memory."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from mae_core.bench.flops import step_flops
from mae_core.bench.timing import MatrixMultiply
from pipelines.runs.jobs import PretrainJob
from pipelines.worker.rank import Rank


@dataclass(frozen=True, kw_only=True)
class GpuMeter:
    """Metrics of rank 0's GPU."""

    device: torch.device
    flops_of: Callable[[int], float]
    """Counted operations per image of a step; 0 if they are not counted for this model."""
    peak_flop_s: float
    """Rate of the fastest matrix product on all GPUs of the group; 0 if there was no memory to measure it."""

    @classmethod
    def of(cls, job: PretrainJob, steps_per_epoch: int, rank: Rank) -> "GpuMeter | None":
        """Measure the rate of a matrix product, which takes a second; return None on other devices and other ranks."""
        if rank.device.type != "cuda" or not rank.is_main:
            return None
        peak_flop_s = rank.world * _product_flop_s(rank)
        return cls(device=rank.device, flops_of=image_flops(job, steps_per_epoch), peak_flop_s=peak_flop_s)

    def read(self, images_per_s: float, step: int) -> dict[str, float]:
        """Return the metrics at this rate of images, which all ranks train on together. The device does not wait.

        The rate is that of the steps before `step`, counted from 1, whose images have the size of the last one's.
        `mfu` is a share of the rate of a matrix product, as in `mae bench step`. `gpu/util` needs NVIDIA's library
        (pip install nvidia-ml-py); it is left out without.
        """
        found = {"gpu/memory": memory_share(self.device)}
        flops = self.flops_of(step - 1)
        if flops and self.peak_flop_s:
            found["mfu"] = mfu(flops, images_per_s, self.peak_flop_s)
        with suppress(ModuleNotFoundError, RuntimeError):
            found["gpu/util"] = torch.cuda.utilization(self.device) / 100
        return found


def image_flops(job: PretrainJob, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the function that counts the operations per decoded image of a step, which its images' size decides."""
    model = job.config.model
    if model.mask_token_in != "decoder":
        return lambda step: 0.0
    counted = [
        (epoch * steps_per_epoch, float(step_flops(replace(model, image_px=size)) * job.config.views_per_image))
        for epoch, size in job.stages
    ]
    return lambda step: next((flops for start, flops in reversed(counted) if step >= start), counted[0][1])


def mfu(flops: float, images_per_s: float, peak_flop_s: float) -> float:
    """Compute the share of the attainable operations per second that the counted ones are."""
    return flops * images_per_s / peak_flop_s


def memory_share(device: torch.device) -> float:
    """Return the share of the device's memory that tensors took at most so far."""
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def _product_flop_s(rank: Rank) -> float:
    """Measure on this rank's GPU, in the precision of its run, without touching the run's random state."""
    dtype = torch.bfloat16 if rank.compute.precision == "bfloat16" else torch.float32
    rate = 0.0
    with torch.random.fork_rng(devices=[rank.device]), suppress(torch.OutOfMemoryError):
        rate = MatrixMultiply.fastest_rate(rank.device, dtype)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(rank.device)
    return rate
