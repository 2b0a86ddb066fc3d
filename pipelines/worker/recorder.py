"""After each step: metrics, a checkpoint, a picture when due, and what to do about a gradient that is not finite."""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mae_core.errors import UserError
from pipelines.config import CheckpointConfig, ClassifyConfig, PretrainConfig
from pipelines.feed.plan import EpochPlan
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.metrics import MetricSpool
from pipelines.worker.goodput import Clock
from pipelines.worker.loop import TrainState
from pipelines.worker.meter import Due, Meter, retention
from pipelines.worker.rank import Rank
from pipelines.worker.saving import CheckpointWriter

log = logging.getLogger(__name__)

WARNING_EVERY_STEPS = 10
"""Steps between two looks for a warning that a node will be taken away; from then on each look saves a checkpoint, so
that no more than these steps are lost."""

_MOST_SKIPPED = 100
_MOST_IDS_LOGGED = 64


class Stopped(Exception):
    """The run cannot go on, and starting it again would not help; says why."""


class RolledBack(RuntimeError):
    """The worker group must start again from the newest checkpoint."""


class Recorder:
    """Does what is due after a step. Every rank has one and calls it after every step."""

    def __init__(
        self,
        *,
        state: TrainState,
        rank: Rank,
        plan: EpochPlan,
        due: Due,
        folder: RunFolder,
        checkpoint: CheckpointConfig,
        clock: Clock,
        picture: Callable[[int], None] | None = None,
    ) -> None:
        self._state, self._rank, self._plan, self._due = state, rank, plan, due
        self._folder, self._picture, self._clock = folder, picture, clock
        self._meter = Meter(rank)
        self._num_skipped = 0
        self._run = (folder.read_identity() or {}).get("id")
        self.spool = MetricSpool(folder.storage)
        self.writer = CheckpointWriter(
            folder.checkpoints,
            retention(checkpoint, plan.steps_per_epoch),
            patience_s=checkpoint.patience_s,
            before=self.spool.flush,
        )
        self.last: dict[str, float] = {}
        """The newest metrics; those of the checkpoint in a run that was killed after its last step."""
        state.skipped_steps = frozenset(rank.agree(sorted(folder.read_skipped_steps())))

    @classmethod
    def of(
        cls,
        config: PretrainConfig | ClassifyConfig,
        state: TrainState,
        rank: Rank,
        plan: EpochPlan,
        folder: RunFolder,
        clock: Clock,
        picture: Callable[[int], None] | None = None,
    ) -> "Recorder":
        """A recorder that does what the run's config asks for."""
        return cls(
            state=state,
            rank=rank,
            plan=plan,
            due=Due.of(config.checkpoint, config.tracking, plan.steps_per_epoch, config.epochs),
            folder=folder,
            checkpoint=config.checkpoint,
            clock=clock,
            picture=picture,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """State and newest metrics are the checkpoint's. Raises UserError for one of another run or model."""
        run = checkpoint.meta.get("run")
        if None not in (run, self._run) and run != self._run:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} in {self._folder.storage.uri} was written by another run; "
                "remove it, or start again with --fresh"
            )
        self._state.restore(checkpoint)
        self.last = dict(checkpoint.meta["last"])

    def after_step(self, step: int, loss: Tensor | None, bad: Tensor | None) -> None:
        """Everything that is due after `step` steps has happened. Raises Stopped or RolledBack by policy."""
        if loss is not None and bad is not None:
            self._meter.add(step, loss, bad, self._plan.planned((step - 1) % self._plan.steps_per_epoch))
        warned = step % WARNING_EVERY_STEPS == 0 and self._rank.is_warned()
        save = warned or self._due.save(step)
        if save or self._due.log(step):
            for bad_step in self._meter.bad_steps():
                self._apply_nan_policy(bad_step)
        if self._due.log(step):
            self._log(step)
        if save and self._rank.is_main:
            with self._clock.spent("checkpoint"):
                self.writer.save(step, self._state.snapshot, self._meta())
                if warned:
                    log.info("a node is about to be taken away: step %d is saved", step)
                    self.writer.wait()
        if self._picture and self._due.picture(step) and self._rank.is_main:
            with self._clock.spent("other"):
                self._draw(step)

    def record_accuracy(self, step: int, split: str, accuracy: dict[str, float]) -> None:
        """The accuracy on the split after `step` steps is recorded; on val it is the score of the step's checkpoint."""
        if not self._rank.is_main:
            return
        self.spool.add(step, accuracy)
        if split == "val":
            with self._clock.spent("checkpoint"):
                self.writer.wait()
                try:
                    self._folder.checkpoints.record_score(step, accuracy["val/top1"])
                except OSError as error:
                    log.warning("the checkpoint of step %d keeps no score: %s", step, error)

    def finish(self) -> None:
        """Everything that was recorded is in the storage. Raises what kept the last checkpoint from it."""
        with self._clock.spent("checkpoint"):
            self.writer.close()
        if self._rank.is_main:
            self.spool.close()

    def _log(self, step: int) -> None:
        point = self._meter.drain() | {
            "lr": self._state.schedule.lr(step - 1),
            "epoch": step / self._plan.steps_per_epoch,
        }
        if not math.isfinite(point.get("train/loss", 0.0)):
            self._stop(f"loss is {point['train/loss']} at step {step}; try a lower optim.base_lr")
        if self._num_skipped:
            point["steps_skipped"] = self._num_skipped
        self.last |= point
        if self._rank.is_main:
            self.spool.add(step, point | {f"goodput/{kind}": share for kind, share in self._clock.shares().items()})

    def _meta(self) -> dict[str, Any]:
        return {
            "steps_per_epoch": self._plan.steps_per_epoch,
            "last": self.last,
            "run": self._run,
            "clock": self._clock.saved(),
        }

    def _draw(self, step: int) -> None:
        """A picture that the storage refuses is no reason to lose time."""
        assert self._picture is not None
        try:
            self._picture(step)
        except OSError as error:
            log.warning("no picture of step %d: %s", step, error)

    def _apply_nan_policy(self, step: int) -> None:
        """What the policy says about a step whose gradient was not finite has been done; every rank calls it."""
        ids = [i for i in self._plan.step_ids(step - 1).tolist() if i >= 0]
        shown = ", ".join(map(str, ids[:_MOST_IDS_LOGGED]))
        said = f"the gradient is not finite at step {step}, whose {len(ids)} samples have the ids {shown}"
        if len(ids) > _MOST_IDS_LOGGED:
            said += f" and {len(ids) - _MOST_IDS_LOGGED} more, all in bad_steps/{step:010d}.json"
        if self._rank.is_main:
            self._folder.record_bad_step(step, ids)
        policy = self._rank.compute.on_nan
        self._num_skipped += 1
        if policy == "stop" or self._num_skipped > _MOST_SKIPPED:
            self._stop(f"{said}; try a lower optim.base_lr, or --compute.on-nan skip")
        if policy == "roll_back":
            self._roll_back(step, said)
        self._rank.log(log, "%s; the step is skipped", said)

    def _stop(self, cause: str) -> None:
        if self._rank.is_main:
            self.writer.wait()
            self.spool.flush()
            self._folder.mark_stopped(cause)
        self._rank.barrier()
        raise Stopped(cause)

    def _roll_back(self, step: int, said: str) -> None:
        """The steps from the newest checkpoint to the bad one will be left out when the group starts again."""
        newest = 0
        if self._rank.is_main:
            self.writer.wait()
            newest = self._folder.checkpoints.latest_intact_step()
            self._folder.skip_steps(range(newest, step))
        self._rank.barrier()
        raise RolledBack(f"{said}; the group goes back to the newest checkpoint and leaves out the steps up to there")
