"""What pretraining and fine-tuning share: steps with accumulation, metrics, checkpoints, resuming."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae_core.config import OptimConfig
from mae_core.optim import build_optimizer
from mae_core.schedule import Schedule, apply_lr, peak_lr
from mae_core.state import load_optimizer_tensors, model_tensors, optimizer_tensors, pack, unpack
from mae_core.step import ema_update
from pipelines.checkpoints import Checkpoint
from pipelines.config import CheckpointConfig, ClassifyConfig, PretrainConfig, TrackingConfig
from pipelines.ingest import MicroBatch
from pipelines.jobs import RunFolder
from pipelines.plan import EpochPlan
from pipelines.report import MetricSpool
from pipelines.worker.rank import Feed, Rank, bare, no_sync

# (model, micro-batch, step, index of the micro-batch within the step over all ranks) -> summed weighted loss
LossOf = Callable[[nn.Module, MicroBatch, int, int], Tensor]


@dataclass
class TrainState:
    """All that changes while training; everything here is saved and restored."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    ema: nn.Module | None = None
    ema_decay: float = 0.0
    clip_norm: float | None = None
    step: int = 0

    @classmethod
    def of(
        cls,
        config: PretrainConfig | ClassifyConfig,
        model: nn.Module,
        parallel: nn.Module,
        steps_per_epoch: int,
        ema_decay: float | None = None,
    ) -> "TrainState":
        """The state before the first step; `parallel` is the model as the ranks share it, already on their devices."""
        peak = peak_lr(config.optim.base_lr, config.data.batch)
        return cls(
            model=parallel,
            optimizer=build_optimizer(model, config.optim, peak),
            schedule=schedule(config.optim, peak, steps_per_epoch, config.epochs),
            clip_norm=config.optim.clip_norm,
            ema=None if ema_decay is None else copy.deepcopy(model).requires_grad_(False).eval(),
            ema_decay=ema_decay or 0.0,
        )

    def update(self) -> None:
        """The gradients that lie ready have been applied, at this step's learning rate."""
        apply_lr(self.optimizer, self.schedule.lr(self.step))
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            ema_update(self.ema, bare(self.model), self.ema_decay)
        self.step += 1

    def save(self, folder: RunFolder, config: CheckpointConfig, meta: dict[str, object]) -> None:
        """A checkpoint of the state is committed."""
        files = {
            "model.safetensors": pack(model_tensors(bare(self.model))),
            "optimizer.safetensors": pack(optimizer_tensors(self.optimizer, bare(self.model))),
        }
        if self.ema is not None:
            files["ema.safetensors"] = pack(model_tensors(self.ema))
        folder.checkpoints.save(Checkpoint(step=self.step, files=files, meta=meta), config.keep)

    def restore(self, checkpoint: Checkpoint) -> None:
        """The state is that of the checkpoint, bit for bit."""
        bare(self.model).load_state_dict(unpack(checkpoint.files["model.safetensors"]))
        load_optimizer_tensors(self.optimizer, bare(self.model), unpack(checkpoint.files["optimizer.safetensors"]))
        if self.ema is not None:
            self.ema.load_state_dict(unpack(checkpoint.files["ema.safetensors"]))
        self.step = checkpoint.step


class Meter:
    """Sums on the device; read, and summed over ranks, only when logging."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._loss = torch.zeros((), dtype=torch.float64, device=rank.device)
        self._steps = 0
        self._samples = 0
        self._since_s = time.perf_counter()

    def add(self, loss: Tensor, num_samples: int) -> None:
        """One step's loss on this rank, already divided by the samples planned over all ranks."""
        self._loss += loss
        self._steps += 1
        self._samples += num_samples

    def drain(self) -> dict[str, float]:
        """Mean loss and global images/s since the last call; every rank calls it."""
        loss = self._rank.sum(self._loss.clone()).item() / max(1, self._steps)
        now_s = time.perf_counter()
        rate = self._samples / max(1e-9, now_s - self._since_s)
        self._loss.zero_()
        self._steps = self._samples = 0
        self._since_s = now_s
        return {"train/loss": loss, "images_per_s": rate}


@dataclass(frozen=True)
class Due:
    """Which steps are followed by what; durations became steps here, once."""

    log_every: int
    save_every: int
    picture_every: int
    last: int

    @classmethod
    def of(cls, checkpoint: CheckpointConfig, tracking: TrackingConfig, steps_per_epoch: int, epochs: int) -> "Due":
        return cls(
            log_every=tracking.log_every_steps,
            save_every=max(1, round(checkpoint.every_epochs * steps_per_epoch)),
            picture_every=tracking.pictures_every_epochs * steps_per_epoch,
            last=epochs * steps_per_epoch,
        )

    def log(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.last

    def save(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.last

    def picture(self, step: int) -> bool:
        return step % self.picture_every == 0 or step == self.last


def schedule(optim: OptimConfig, peak: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """The learning rate of every step; epochs became steps here, once."""
    return Schedule(
        peak_lr=peak,
        min_lr=optim.min_lr,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )


def warm_up(state: TrainState, rank: Rank, batch: MicroBatch, loss_of: LossOf) -> None:
    """Two discarded iterations have settled DDP's buckets, so that a resumed run sums gradients in the same order.

    DDP rebuilds its buckets after the first backward; without this, hashes differ at three ranks and more.
    """
    for _ in range(2):
        (loss_of(state.model, batch, 0, 0) * 0.0).backward()
        state.optimizer.zero_grad(set_to_none=True)


def train_step(state: TrainState, rank: Rank, plan: EpochPlan, batches: list[MicroBatch], loss_of: LossOf) -> Tensor:
    """One optimizer step over this rank's micro-batches; returns its share of the mean loss.

    Each rank's summed weighted loss is scaled by world size / samples planned, since DDP averages over ranks.
    """
    planned = plan.planned(state.step % plan.steps_per_epoch)
    total = torch.zeros((), device=rank.device)
    for i, batch in enumerate(batches):
        index = i * rank.world + rank.index
        if i + 1 < len(batches):
            with no_sync(state.model):
                loss = _backward(state, rank, batch, index, planned, loss_of)
        else:
            loss = _backward(state, rank, batch, index, planned, loss_of)
        total += loss
    state.update()
    return total / planned


def _backward(state: TrainState, rank: Rank, batch: MicroBatch, index: int, planned: int, loss_of: LossOf) -> Tensor:
    loss = loss_of(state.model, batch, state.step, index)
    (loss * (rank.world / planned)).backward()
    return loss.detach()


def train(
    state: TrainState,
    rank: Rank,
    plan: EpochPlan,
    feed: Feed,
    last_step: int,
    loss_of: LossOf,
    after_step: Callable[[int, Tensor], None],
) -> None:
    """Steps up to `last_step` are done."""
    per_rank = plan.micro_batches_per_step // rank.world
    while state.step < last_step:
        batches = [batch.to(rank.device) for batch in feed.take(state.step, per_rank)]
        loss = train_step(state, rank, plan, batches, loss_of)
        after_step(state.step, loss)


class Recorder:
    """After each step: metrics when due, a checkpoint when due, a picture when due."""

    def __init__(
        self,
        *,
        state: TrainState,
        rank: Rank,
        plan: EpochPlan,
        due: Due,
        folder: RunFolder,
        checkpoint: CheckpointConfig,
        picture: Callable[[int], None] | None = None,
    ) -> None:
        self._state, self._rank, self._plan, self._due = state, rank, plan, due
        self._folder, self._checkpoint, self._picture = folder, checkpoint, picture
        self._meter = Meter(rank)
        self.spool = MetricSpool(folder.storage)
        self.last: dict[str, float] = {}
        """The newest metrics; those of the checkpoint in a run that was killed after its last step."""

    @classmethod
    def of(
        cls,
        config: PretrainConfig | ClassifyConfig,
        state: TrainState,
        rank: Rank,
        plan: EpochPlan,
        folder: RunFolder,
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
            picture=picture,
        )

    def after_step(self, step: int, loss: Tensor) -> None:
        """Everything that is due after `step` steps has happened."""
        self._meter.add(loss, self._plan.planned((step - 1) % self._plan.steps_per_epoch))
        if self._due.log(step):
            point = self._meter.drain() | {
                "lr": self._state.schedule.lr(step - 1),
                "epoch": step / self._plan.steps_per_epoch,
            }
            if not math.isfinite(point["train/loss"]):
                raise FloatingPointError(f"loss is {point['train/loss']} at step {step}; try a lower optim.base_lr")
            self.last = point
            if self._rank.is_main:
                self.spool.add(step, point)
        if self._due.save(step) and self._rank.is_main:
            self.spool.flush()
            meta = {"steps_per_epoch": self._plan.steps_per_epoch, "last": self.last}
            self._state.save(self._folder, self._checkpoint, meta)
        if self._picture and self._due.picture(step) and self._rank.is_main:
            self._picture(step)
