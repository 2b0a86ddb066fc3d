"""Randomness without state: a number depends on its key (seed, purpose, counters) and on nothing else.

The hash is splitmix64's finalizer (Steele, Lea and Flood 2014), chained over the key. Torch has no uint64 shifts, so
the bits travel in int64, where addition and multiplication wrap and right shifts are masked to be logical.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64, UInt64
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BITS = (1 << 64) - 1


class Purpose(IntEnum):
    """What a number is drawn for. The values are part of every key: never renumber."""

    MASK = 1
    ROW_GROUPS = 2
    ROWS = 3
    CROP = 4
    FLIP = 5
    AUGMENT = 6
    ERASE = 7
    MIXUP = 8
    DROP_PATH = 9
    HOLDOUT = 10
    INIT = 11
    SUBSET = 12
    PREDICT = 13


def hash64(seed: int, purpose: Purpose, *counters: Int[Tensor, "..."] | int) -> Int64[Tensor, "..."]:
    """64 random bits for every key, as int64; counters broadcast. The same on every device."""
    state, rest = _prefix(seed, purpose, counters)
    hashed: Tensor | int = _signed(state)
    for counter in rest:
        base = hashed + _signed(_GAMMA) if isinstance(hashed, Tensor) else _signed(hashed + _GAMMA)
        value = counter.to(torch.int64) if isinstance(counter, Tensor) else _signed(counter)
        hashed = _mix(value ^ base)  # pyright: ignore[reportArgumentType] -- the first of `rest` is a tensor
    return hashed if isinstance(hashed, Tensor) else torch.tensor(hashed)


def hash64_numpy(seed: int, purpose: Purpose, *counters: Int[np.ndarray, "..."] | int) -> UInt64[np.ndarray, "..."]:
    """The bits of `hash64`, as uint64."""
    state, rest = _prefix(seed, purpose, counters)
    hashed = np.asarray(state, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in rest:
            value = np.asarray(counter if isinstance(counter, np.ndarray) else counter & _BITS)
            hashed = _mix_numpy((hashed + np.uint64(_GAMMA)) ^ value.astype(np.uint64))
    return np.asarray(hashed)


def uniform(seed: int, purpose: Purpose, *counters: Int[Tensor, "..."] | int) -> Float64[Tensor, "..."]:
    """A uniform number in [0, 1) for every key, with 53 random bits."""
    return _shift(hash64(seed, purpose, *counters), 11).to(torch.float64) * 2.0**-53


def uniform_numpy(seed: int, purpose: Purpose, *counters: Int[np.ndarray, "..."] | int) -> Float64[np.ndarray, "..."]:
    """The numbers of `uniform`."""
    return np.asarray((hash64_numpy(seed, purpose, *counters) >> np.uint64(11)) * 2.0**-53)


def seed_of(seed: int, purpose: Purpose, *counters: int) -> int:
    """A seed in [0, 2**63) for a generator that has one."""
    return _prefix(seed, purpose, counters)[0] >> 1


def _prefix(seed: int, purpose: Purpose, counters: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
    """The hash of everything up to the first counter that is an array, and the counters from there on."""
    state = _mix_int(_mix_int(seed & _BITS) + int(purpose) * _GAMMA)
    for index, counter in enumerate(counters):
        if not isinstance(counter, int | np.integer):
            return state, counters[index:]
        state = _mix_int((state + _GAMMA & _BITS) ^ (int(counter) & _BITS))
    return state, ()


def _mix_int(state: int) -> int:
    state &= _BITS
    state = ((state ^ state >> 30) * _MIX_1) & _BITS
    state = ((state ^ state >> 27) * _MIX_2) & _BITS
    return state ^ state >> 31


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(_MIX_2)
    return state ^ _shift(state, 31)


def _mix_numpy(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    return state ^ (state >> np.uint64(31))


def _shift(state: Tensor, bits: int) -> Tensor:
    """A logical right shift: int64's own drags the sign along."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= _BITS
    return value - (1 << 64) if value >> 63 else value
