"""What a run makes of its GPU, for the metrics: share of the attainable rate, utilisation, memory."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from mae_core.bench.flops import step_flops
from mae_core.bench.timing import MatrixMultiply
from mae_core.config import ModelConfig
from pipelines.worker.rank import Rank


@dataclass(frozen=True, kw_only=True)
class GpuMeter:
    """Metrics of rank 0's GPU."""

    device: torch.device
    flops: float
    """Counted operations per image; 0 if they are not counted for this model."""
    peak_flop_s: float
    """Rate of the fastest matrix product on all GPUs of the group; 0 if there was no memory to measure it."""

    @classmethod
    def of(cls, model: ModelConfig, views_per_image: int, rank: Rank) -> "GpuMeter | None":
        """Measure the rate of a matrix product, which takes a second; return None on other devices and other ranks."""
        if rank.device.type != "cuda" or not rank.is_main:
            return None
        is_counted = model.mask_token_in == "decoder"
        flops = float(step_flops(model) * views_per_image) if is_counted else 0.0
        return cls(device=rank.device, flops=flops, peak_flop_s=rank.world * _product_flop_s(rank))

    def read(self, images_per_s: float) -> dict[str, float]:
        """Return the metrics at this rate of images, which all ranks train on together. The device does not wait.

        `mfu` is a share of the rate of a matrix product, as in `mae bench step`. `gpu/util` needs NVIDIA's library
        (pip install nvidia-ml-py); it is left out without.
        """
        found = {"gpu/memory": memory_share(self.device)}
        if self.flops and self.peak_flop_s:
            found["mfu"] = mfu(self.flops, images_per_s, self.peak_flop_s)
        with suppress(ModuleNotFoundError, RuntimeError):
            found["gpu/util"] = torch.cuda.utilization(self.device) / 100
        return found


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
