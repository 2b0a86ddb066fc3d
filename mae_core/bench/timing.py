"""Interleaved timing, so that a disturbance affects everything timed alike, and its statistics."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray

_CPU_SIDES = (256, 512, 1024)
_CUDA_SIDES = (4096, 8192, 16384)


def interleaved(
    actions: Sequence[Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Float64[np.ndarray, "actions rounds"]:
    """Time every action once per round, in seconds of the clock; each round starts with another action."""
    found = np.zeros((len(actions), rounds))
    for number in range(rounds):
        for offset in range(len(actions)):
            index = (number + offset) % len(actions)
            _settle(device)
            begin_s = clock()
            actions[index]()
            _settle(device)
            found[index, number] = clock() - begin_s
    return found


@dataclass(frozen=True)
class Ratio:
    """Ratio of two durations, with the 95 % interval of the median of the paired ratios."""

    of_medians: float
    low: float
    high: float


def ratio(times_s: NDArray[np.float64], base_s: NDArray[np.float64]) -> Ratio:
    """Compute times_s / base_s, both measured in the same rounds."""
    low, high = median_interval(times_s / base_s)
    return Ratio(float(np.median(times_s) / np.median(base_s)), low, high)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Compute a distribution-free 95 % interval of the median from order statistics; needs six values."""
    num = len(values)
    ranked = np.sort(values)
    below, outside = 0.0, -1
    while below + comb(num, outside + 1) / 2**num <= 0.025:
        outside += 1
        below += comb(num, outside) / 2**num
    assert outside >= 0, f"{num} values have no 95 % interval"
    return float(ranked[outside]), float(ranked[num - 1 - outside])


def spread(times_s: NDArray[np.float64]) -> float:
    """Compute the interquartile range as a share of the median."""
    low, middle, high = np.quantile(times_s, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


@dataclass(frozen=True)
class MatrixMultiply:
    """A product of two square matrices, as the highest rate that the device reaches in practice."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def fastest(
        cls, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
    ) -> "MatrixMultiply":
        """Choose the size that runs at the highest rate on this device."""
        return cls._fastest(device, dtype, clock)[0]

    @classmethod
    def fastest_rate(cls, device: torch.device, dtype: torch.dtype) -> float:
        """Measure the highest rate of such a product on this device, in operations per second."""
        return cls._fastest(device, dtype, time.perf_counter)[1]

    @classmethod
    def _fastest(
        cls, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
    ) -> tuple["MatrixMultiply", float]:
        sides = _CUDA_SIDES if device.type == "cuda" else _CPU_SIDES
        candidates = [cls(*torch.randn(2, side, side, device=device, dtype=dtype)) for side in sides]
        for candidate in candidates:
            candidate()
        times_s = interleaved(candidates, 5, device, clock).min(axis=1)
        rates = [candidate.flops / time_s for candidate, time_s in zip(candidates, times_s)]
        best = int(np.argmax(rates))
        return candidates[best], rates[best]

    @property
    def flops(self) -> int:
        return 2 * len(self.left) ** 3

    def __call__(self) -> object:
        return self.left @ self.right


def _settle(device: torch.device) -> Any:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
