"""Learning rate per step: a linear warm-up, then a decay of one of two shapes.

- cosine: half a cosine from the peak to the minimum (Tables 8 to 10). After another run's end, this is a warm restart
  (Loshchilov and Hutter 2017).
- constant: the peak, then a decay to the minimum in the last steps (warmup-stable-decay, Hu et al. 2024), as 1 - sqrt
  of the decay's progress (Hägele et al. 2024). Until it decays, such a run is the beginning of any longer one.
"""

from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Literal

from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a function of the step, counted from 0 over the whole training, earlier runs included."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    """Steps after which training ends, counted from step 0, not from `first_step`."""
    shape: Literal["cosine", "constant"] = "cosine"
    decay_steps: int = 0
    """Last steps, in which a constant schedule decays; those of a cosine are all after the warm-up."""
    first_step: int = 0
    """Step at which the warm-up starts: that at which another run ended, or 0."""
    start_lr: float = 0.0
    """Rate at which the warm-up starts: that at which another run ended, or 0."""

    def lr(self, step: int) -> float:
        """Return the rate of step `step`; with a warm-up, that of `first_step` is `start_lr`."""
        done = step - self.first_step
        if done < self.warmup_steps:
            return self.start_lr + (self.peak_lr - self.start_lr) * done / self.warmup_steps
        return self.min_lr + (self.peak_lr - self.min_lr) * self._height(step)

    def _height(self, step: int) -> float:
        """Return the rate of a step after the warm-up, from 1 at the peak to 0 at the minimum."""
        if self.shape == "constant":
            decayed = step - (self.total_steps - self.decay_steps)
            return 1 - sqrt(min(1.0, max(0, decayed) / max(1, self.decay_steps))) if self.decay_steps else 1.0
        warm = self.first_step + self.warmup_steps
        progress = (step - warm) / max(1, self.total_steps - warm)
        return 0.5 * (1 + cos(pi * min(1.0, progress)))


def peak_lr(base_lr: float, batch: int) -> float:
    """Apply the linear scaling rule: base_lr is for a batch of 256 (Goyal et al. 2017)."""
    return base_lr * batch / 256


def apply_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every parameter group to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
