"""Loss and throughput between two log points, and the steps at which to log, save, draw and evaluate."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.config import CheckpointConfig, TrackingConfig
from pipelines.runs.checkpoints import Retention
from pipelines.worker.rank import Rank


@dataclass(frozen=True)
class Due:
    """Steps after which to log, save, draw and evaluate. Only here are these intervals converted to steps."""

    log_every: int
    save_every: int
    picture_every: int
    last: int
    evaluate_every: int = 0
    """0 for no evaluation."""

    @classmethod
    def of(
        cls,
        checkpoint: CheckpointConfig,
        tracking: TrackingConfig,
        steps_per_epoch: int,
        epochs: int,
        evaluate_every_epochs: int = 0,
    ) -> "Due":
        return cls(
            log_every=tracking.log_every_steps,
            save_every=max(1, round(checkpoint.every_epochs * steps_per_epoch)),
            picture_every=tracking.pictures_every_epochs * steps_per_epoch,
            last=epochs * steps_per_epoch,
            evaluate_every=evaluate_every_epochs * steps_per_epoch,
        )

    def log(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.last

    def save(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.last

    def picture(self, step: int) -> bool:
        return step % self.picture_every == 0 or step == self.last

    def evaluate(self, step: int) -> bool:
        return self.evaluate_every > 0 and (step % self.evaluate_every == 0 or step == self.last)

    def num_evaluations(self, first: int = 0) -> int:
        """Count the steps to evaluate up to the last one, from `first` on if the run extends another."""
        if not self.evaluate_every:
            return 0
        return -(-self.last // self.evaluate_every) - -(-first // self.evaluate_every) + (first > 0)


def retention(checkpoint: CheckpointConfig, steps_per_epoch: int) -> Retention:
    """Return which checkpoints to keep, with epochs converted to steps."""
    every = checkpoint.keep_every_epochs
    return Retention(
        newest=checkpoint.keep,
        best=checkpoint.keep_best,
        every_steps=None if every is None else every * steps_per_epoch,
    )


class Meter:
    """Sum losses on the device. They are read, and summed over ranks, only when logging or saving."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._loss = torch.zeros((), dtype=torch.float64, device=rank.device)
        self._steps = self._samples = 0
        self._since_s = time.perf_counter()
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor, bad: Tensor, num_samples: int) -> None:
        """Add a step: this rank's share of its mean loss, 1 in `bad` if the update was skipped, and its samples."""
        self._loss += torch.where(bad > 0, torch.zeros_like(loss), loss)
        self._steps += 1
        self._samples += num_samples
        self._unread.append((step, bad))

    def bad_steps(self) -> list[int]:
        """Return the steps since the last call whose gradient was not finite; the same on every rank."""
        if not self._unread:
            return []
        steps, flags = zip(*self._unread, strict=True)
        self._unread = []
        found = [step for step, bad in zip(steps, torch.stack(flags).tolist(), strict=True) if bad]
        self._steps -= len(found)
        return found

    def pending(self) -> dict[str, Any]:
        """Return what the next log point is made of so far, for a checkpoint: the loss by rank, and the steps.

        Every rank must call it, after `bad_steps`.
        """
        if not self._steps:
            return {}
        return {"loss": [loss.item() for loss in self._rank.gather(self._loss)], "steps": self._steps}

    def restore(self, pending: Mapping[str, Any]) -> None:
        """Continue towards the log point of `pending`, with as many ranks as wrote it or others."""
        if not pending:
            return
        losses = pending["loss"]
        if len(losses) != self._rank.world:
            losses = [sum(losses), *[0.0] * (self._rank.world - 1)]
        self._loss.fill_(losses[self._rank.index])
        self._steps = pending["steps"]

    def drain(self) -> dict[str, float]:
        """Return mean loss over the steps that were not skipped, and images/s of all ranks, since the last call.

        Every rank must call it, after `bad_steps`.
        """
        assert not self._unread, "call bad_steps() first"
        loss = self._rank.sum(self._loss.clone()).item()
        now_s = time.perf_counter()
        found = {"images_per_s": self._samples / max(1e-9, now_s - self._since_s)}
        if self._steps:
            found["train/loss"] = loss / self._steps
        self._loss.zero_()
        self._steps = self._samples = 0
        self._since_s = now_s
        return found
