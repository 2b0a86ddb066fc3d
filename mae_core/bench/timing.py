"""Times of several things measured in turn, so that what disturbs one disturbs all, and what they say."""

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
    """Seconds, by the clock, of every action in every round; each round begins with another action."""
    found = np.zeros((len(actions), rounds))
    for turn in range(rounds):
        for place in range(len(actions)):
            index = (turn + place) % len(actions)
            _settle(device)
            begin_s = clock()
            actions[index]()
            _settle(device)
            found[index, turn] = clock() - begin_s
    return found


@dataclass(frozen=True)
class Ratio:
    """How many times as long a thing took as another, and the 95 % interval of the median of the paired ratios."""

    of_medians: float
    low: float
    high: float


def ratio(times_s: NDArray[np.float64], base_s: NDArray[np.float64]) -> Ratio:
    """times_s to base_s, measured in the same rounds."""
    low, high = median_interval(times_s / base_s)
    return Ratio(float(np.median(times_s) / np.median(base_s)), low, high)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics, whatever the distribution; needs six values."""
    num = len(values)
    ranked = np.sort(values)
    below, outside = 0.0, -1
    while below + comb(num, outside + 1) / 2**num <= 0.025:
        outside += 1
        below += comb(num, outside) / 2**num
    assert outside >= 0, f"{num} values have no 95 % interval"
    return float(ranked[outside]), float(ranked[num - 1 - outside])


def spread(times_s: NDArray[np.float64]) -> float:
    """The distance between the quartiles, as a share of the median."""
    low, middle, high = np.quantile(times_s, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


@dataclass(frozen=True)
class MatrixMultiply:
    """A product of two square matrices: the most that the device can do."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def fastest(
        cls, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
    ) -> "MatrixMultiply":
        """The one, of several sizes, that runs at the highest rate here."""
        sides = _CUDA_SIDES if device.type == "cuda" else _CPU_SIDES
        candidates = [cls(*torch.randn(2, side, side, device=device, dtype=dtype)) for side in sides]
        for candidate in candidates:
            candidate()
        times_s = interleaved(candidates, 5, device, clock).min(axis=1)
        rates = [candidate.flops / time_s for candidate, time_s in zip(candidates, times_s)]
        return candidates[int(np.argmax(rates))]

    @property
    def flops(self) -> int:
        return 2 * len(self.left) ** 3

    def __call__(self) -> object:
        return self.left @ self.right


def _settle(device: torch.device) -> Any:
    """All that the device was asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
