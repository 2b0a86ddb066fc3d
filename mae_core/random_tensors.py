"""The random numbers of `randomness` as tensors, identical on every device.

Torch has no uint64 shifts, so the bits travel in int64, where addition and multiplication wrap and right shifts are
masked to be logical.
"""

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from mae_core.randomness import GAMMA, MIX_1, MIX_2, Purpose, prefix


def hash64(seed: int, purpose: Purpose, *counters: Int[Tensor, "..."] | int) -> Int64[Tensor, "..."]:
    """Hash every key to 64 random bits as int64; counters broadcast."""
    state, rest = prefix(seed, purpose, counters)
    hashed: Tensor | int = _signed(state)
    for counter in rest:
        base = hashed + _signed(GAMMA) if isinstance(hashed, Tensor) else _signed(hashed + GAMMA)
        value = counter.to(torch.int64) if isinstance(counter, Tensor) else _signed(counter)
        hashed = _mix(value ^ base)  # pyright: ignore[reportArgumentType] -- the first of `rest` is a tensor
    return hashed if isinstance(hashed, Tensor) else torch.tensor(hashed)


def uniform(seed: int, purpose: Purpose, *counters: Int[Tensor, "..."] | int) -> Float64[Tensor, "..."]:
    """Draw a uniform number in [0, 1) with 53 random bits for every key; counters broadcast."""
    return _shift(hash64(seed, purpose, *counters), 11).to(torch.float64) * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _signed(MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(MIX_2)
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right logically; int64's own shift extends the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Wrap `value` to the int64 with the same lowest 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
