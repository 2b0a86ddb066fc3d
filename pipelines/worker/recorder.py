"""After each step: log, save, draw and evaluate what is due, and handle a gradient that is not finite."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mae_core.errors import UserError
from mae_core.state import model_tensors
from pipelines.config import CheckpointConfig, ClassifyConfig, PretrainConfig
from pipelines.feed.listing import StepPlan
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.metrics import MetricSpool
from pipelines.worker.evaluations import EvaluationQueue, encoder_tensors
from pipelines.worker.goodput import Clock
from pipelines.worker.gpu_meter import GpuMeter
from pipelines.worker.loop import TrainState, copied
from pipelines.worker.meter import Due, Meter, retention
from pipelines.worker.rank import Rank, unwrapped
from pipelines.worker.saving import CheckpointWriter, Tensors
from pipelines.worker.stop_gate import StopRequested

log = logging.getLogger(__name__)

PREEMPTION_CHECK_STEPS = 10
"""Steps between two checks for an announced preemption. After the announcement, each check saves a checkpoint, so a run
loses no more steps than this."""

_MAX_SKIPPED = 100
_MAX_IDS_LOGGED = 64


def due_of(config: PretrainConfig | ClassifyConfig, plan: StepPlan, first_epoch: int = 0) -> Due:
    """Return what is due after which step, from the config of a run whose epochs start at `first_epoch`."""
    every_epochs = config.evaluate.every_epochs if isinstance(config, PretrainConfig) else 0
    last_epoch = first_epoch + config.epochs
    return Due.of(config.checkpoint, config.tracking, plan.steps_per_epoch, last_epoch, every_epochs)


class Stopped(Exception):
    """The run cannot continue, and restarting its workers would not help; the message names the cause."""


class RolledBack(RuntimeError):
    """The worker group must restart from the newest checkpoint; raised so that Ray Train restarts it."""


class Recorder:
    """Record a run: metrics, checkpoints, pictures. Every rank has one and calls `after_step` after every step.

    Only rank 0 writes. `spool` takes metrics, `writer` takes checkpoints, `picture` draws one after a step,
    `evaluations` takes the encoder's weights, and `gpu` adds metrics of the device.
    """

    def __init__(
        self,
        *,
        state: TrainState,
        rank: Rank,
        plan: StepPlan,
        due: Due,
        folder: RunFolder,
        checkpoint: CheckpointConfig,
        clock: Clock,
        picture: Callable[[int], None] | None = None,
        evaluations: EvaluationQueue | None = None,
        gpu: GpuMeter | None = None,
    ) -> None:
        self._evaluations, self._gpu = evaluations, gpu
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
        self._saved_step = 0
        self.last: dict[str, float] = {}
        """Newest metrics, at first those of the checkpoint. Each checkpoint stores them."""
        state.skipped_steps = frozenset(rank.agree(sorted(folder.read_skipped_steps())))

    @classmethod
    def of(
        cls,
        config: PretrainConfig | ClassifyConfig,
        state: TrainState,
        rank: Rank,
        plan: StepPlan,
        folder: RunFolder,
        clock: Clock,
        picture: Callable[[int], None] | None = None,
        evaluations: EvaluationQueue | None = None,
        first_epoch: int = 0,
        gpu: GpuMeter | None = None,
    ) -> "Recorder":
        """Build a recorder from the run's config; its epochs start at `first_epoch`."""
        return cls(
            state=state,
            rank=rank,
            plan=plan,
            due=due_of(config, plan, first_epoch),
            folder=folder,
            checkpoint=config.checkpoint,
            clock=clock,
            picture=picture,
            evaluations=evaluations,
            gpu=gpu,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore state and newest metrics. Raises UserError if the checkpoint is of another run or model."""
        run = checkpoint.meta.get("run")
        if None not in (run, self._run) and run != self._run:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} in {self._folder.storage.uri} was written by another run; "
                "remove it, or start again with --fresh"
            )
        self._state.restore(checkpoint)
        self._saved_step = checkpoint.step
        self.last = dict(checkpoint.meta["last"])
        self._meter.restore(checkpoint.meta.get("pending", {}))
        # An evaluation of these weights may have been lost with the process that waited for it.
        self._evaluate(checkpoint.step)

    def after_step(self, step: int, loss: Tensor | None, bad: Tensor | None) -> None:
        """Do everything that is due after `step` steps, counted from 1.

        `loss` is this rank's share of the mean loss, and `bad` is 1 if the gradient was not finite; both are None for a
        skipped step. Raises Stopped or RolledBack as `compute.on_nan` says.
        """
        if loss is not None and bad is not None:
            self._meter.add(step, loss, bad, self._plan.planned(step - 1))
        preempted = step % PREEMPTION_CHECK_STEPS == 0 and self._rank.is_preemption_announced()
        save = preempted or self._due.save(step)
        if save or self._due.log(step):
            for bad_step in self._meter.bad_steps():
                self._apply_nan_policy(bad_step)
        if self._due.log(step):
            self._log(step)
        pending = self._meter.pending() if save else {}
        if save and self._rank.is_main:
            with self._clock.spent("checkpoint"):
                self._save(step, pending)
                if preempted:
                    log.info("a node will be preempted: saving step %d", step)
                    self.writer.wait()
        self._evaluate(step)
        if self._picture and self._due.picture(step) and self._rank.is_main:
            with self._clock.spent("other"):
                self._draw(step)

    def record_accuracy(self, step: int, split: str, accuracy: dict[str, float]) -> None:
        """Log the accuracy on a split after `step` steps; store the top-1 (or mAP) on val as the checkpoint's score."""
        if not self._rank.is_main:
            return
        self.spool.add(step, accuracy)
        if split == "val":
            with self._clock.spent("checkpoint"):
                self.writer.wait()
                try:
                    self._folder.checkpoints.record_score(step, accuracy.get("val/top1", accuracy.get("val/map", 0.0)))
                except OSError as error:
                    log.warning("could not store the score of the checkpoint of step %d: %s", step, error)

    def finish(self) -> None:
        """Wait until metrics and checkpoints are in the storage. Raises the error of the last commit, if it failed."""
        with self._clock.spent("checkpoint"):
            self.writer.close()
        if self._rank.is_main:
            self.spool.close()

    @contextmanager
    def saving_if_stopped(self) -> Iterator[None]:
        """Save a checkpoint of the present step if the driver stops the group while the block runs."""
        try:
            yield
        except StopRequested:
            self.save_and_finish()
            raise

    def save_and_finish(self) -> None:
        """Save a checkpoint of the present step, if there is none, and wait for it. Every rank must call it."""
        for bad_step in self._meter.bad_steps():
            self._apply_nan_policy(bad_step)
        pending = self._meter.pending()
        if self._rank.is_main and self._state.step > self._saved_step:
            self._save(self._state.step, pending)
        self.finish()

    def _save(self, step: int, pending: dict[str, Any]) -> None:
        self.writer.save(step, lambda: self._snapshot(step), self._meta() | {"pending": pending})
        self._saved_step = step

    def _snapshot(self, step: int) -> Tensors:
        """Copy the training state for a checkpoint; an evaluation that is due shares the copy."""
        found = self._state.snapshot()
        if evaluations := self._evaluations_due(step):
            evaluations.put(step, encoder_tensors(found.get("ema", found["model"])))
        return found

    def _evaluate(self, step: int) -> None:
        """Copy the encoder for an evaluation that is due, unless it shares the copy of a checkpoint."""
        if evaluations := self._evaluations_due(step):
            with self._clock.spent("evaluation"):
                model = self._state.ema or unwrapped(self._state.model)
                evaluations.put(step, copied(encoder_tensors(model_tensors(model))))

    def _evaluations_due(self, step: int) -> EvaluationQueue | None:
        is_due = self._due.evaluate(step) and self._evaluations is not None and self._evaluations.wants(step)
        return self._evaluations if is_due else None

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
            measured = self._gpu.read(point["images_per_s"], step) if self._gpu else {}
            shares = {f"goodput/{kind}": share for kind, share in self._clock.shares().items()}
            self.spool.add(step, point | measured | shares)

    def _meta(self) -> dict[str, Any]:
        return {
            "steps_per_epoch": self._plan.steps_per_epoch,
            "last": self.last,
            "run": self._run,
            "clock": self._clock.saved(),
        }

    def _draw(self, step: int) -> None:
        """Draw the picture of a step. Log an error of the storage and continue: a run does not need its pictures."""
        assert self._picture is not None
        try:
            self._picture(step)
        except OSError as error:
            log.warning("could not write the picture of step %d: %s", step, error)

    def _apply_nan_policy(self, step: int) -> None:
        """Handle a step whose gradient was not finite as `compute.on_nan` says. Every rank must call it."""
        ids = [i for i in self._plan.step_ids(step - 1).tolist() if i >= 0]
        shown = ", ".join(map(str, ids[:_MAX_IDS_LOGGED]))
        cause = f"the gradient is not finite at step {step}, whose {len(ids)} samples have the ids {shown}"
        if len(ids) > _MAX_IDS_LOGGED:
            cause += f" and {len(ids) - _MAX_IDS_LOGGED} more, all in bad_steps/{step:010d}.json"
        if self._rank.is_main:
            self._folder.record_bad_step(step, ids)
        policy = self._rank.compute.on_nan
        self._num_skipped += 1
        if policy == "stop" or self._num_skipped > _MAX_SKIPPED:
            self._stop(f"{cause}; try a lower optim.base_lr, or --compute.on-nan skip")
        if policy == "roll_back":
            self._roll_back(step, cause)
        self._rank.log(log, "%s; the step is skipped", cause)

    def _stop(self, cause: str) -> None:
        if self._rank.is_main:
            self.writer.wait()
            self.spool.flush()
            self._folder.mark_stopped(cause)
        self._rank.barrier()
        raise Stopped(cause)

    def _roll_back(self, step: int, cause: str) -> None:
        """Skip the steps from the newest checkpoint to the bad one in the restarted group. Raises RolledBack."""
        newest = 0
        if self._rank.is_main:
            self.writer.wait()
            newest = self._folder.checkpoints.latest_intact_step()
            self._folder.skip_steps(range(newest, step))
        self._rank.barrier()
        raise RolledBack(f"{cause}; restarting from the newest checkpoint, skipping the steps from there to this one")
