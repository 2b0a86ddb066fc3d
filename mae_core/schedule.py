"""Learning-rate schedule: linear warm-up, then a half-cosine decay, per step (Tables 8 to 10)."""

from dataclasses import dataclass
from math import cos, pi

from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a function of the step."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0; with a warm-up, that of the first step is 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + cos(pi * min(1.0, progress)))


def peak_lr(base_lr: float, batch: int) -> float:
    """Apply the linear scaling rule: base_lr is for a batch of 256 (Goyal et al. 2017)."""
    return base_lr * batch / 256


def apply_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every parameter group to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
