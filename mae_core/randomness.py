"""Stateless random numbers: each is a function of its key (seed, purpose, counters).

The hash is splitmix64's finalizer (Steele, Lea and Flood 2014), chained over the key. This module imports no torch,
since many processes do not need it; `random_tensors` computes the same numbers as tensors.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, UInt64

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_BITS = (1 << 64) - 1


class Purpose(IntEnum):
    """Use of a random number. The values are part of every key: never renumber."""

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
    EVALUATE = 14
    TURN = 15
    BANDS = 16


def hash64_numpy(seed: int, purpose: Purpose, *counters: Int[np.ndarray, "..."] | int) -> UInt64[np.ndarray, "..."]:
    """Hash every key to 64 random bits; counters broadcast."""
    state, rest = prefix(seed, purpose, counters)
    hashed = np.asarray(state, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in rest:
            value = np.asarray(counter if isinstance(counter, np.ndarray) else counter & _BITS)
            hashed = _mix_numpy((hashed + np.uint64(GAMMA)) ^ value.astype(np.uint64))
    return np.asarray(hashed)


def uniform_numpy(seed: int, purpose: Purpose, *counters: Int[np.ndarray, "..."] | int) -> Float64[np.ndarray, "..."]:
    """Draw a uniform number in [0, 1) with 53 random bits for every key; counters broadcast."""
    return np.asarray((hash64_numpy(seed, purpose, *counters) >> np.uint64(11)) * 2.0**-53)


def seed_of(seed: int, purpose: Purpose, *counters: int) -> int:
    """Derive a seed in [0, 2**63) for a stateful generator."""
    return prefix(seed, purpose, counters)[0] >> 1


def prefix(seed: int, purpose: Purpose, counters: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
    """Hash the key up to the first counter that is an array; return the state and the remaining counters."""
    state = _mix_int(_mix_int(seed & _BITS) + int(purpose) * GAMMA)
    for index, counter in enumerate(counters):
        if not isinstance(counter, int | np.integer):
            return state, counters[index:]
        state = _mix_int((state + GAMMA & _BITS) ^ (int(counter) & _BITS))
    return state, ()


def _mix_int(state: int) -> int:
    state &= _BITS
    state = ((state ^ state >> 30) * MIX_1) & _BITS
    state = ((state ^ state >> 27) * MIX_2) & _BITS
    return state ^ state >> 31


def _mix_numpy(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_2)
    return state ^ (state >> np.uint64(31))
