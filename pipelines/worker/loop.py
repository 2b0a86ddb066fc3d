"""The training loop of pretraining and fine-tuning: training state, steps with gradient accumulation."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae_core.config import OptimConfig
from mae_core.errors import UserError
from mae_core.optim import build_optimizer
from mae_core.schedule import Schedule, apply_lr, peak_lr
from mae_core.state import load_optimizer_tensors, model_tensors, optimizer_tensors, unpack
from mae_core.step import ema_update
from pipelines.config import ClassifyConfig, PretrainConfig
from pipelines.feed.listing import StepPlan
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan
from pipelines.runs.checkpoints import Checkpoint
from pipelines.stages import note
from pipelines.worker.rank import Feed, Rank, no_sync, unwrapped
from pipelines.worker.saving import Tensors

# (model, micro-batch, step, index of the micro-batch within the global batch) -> sum of the weighted losses of samples
LossOf = Callable[[nn.Module, MicroBatch, int, int], Tensor]

# (steps done, this rank's share of the mean loss, 1 if the gradient was not finite else 0); both None if skipped
AfterStep = Callable[[int, Tensor | None, Tensor | None], None]


@dataclass
class TrainState:
    """Everything that changes while training. Model, optimizer, moving average and step are saved and restored."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    ema: nn.Module | None = None
    ema_decay: float = 0.0
    clip_norm: float | None = None
    step: int = 0
    skipped_steps: frozenset[int] = frozenset()
    """Steps, counted from 0, whose micro-batches are read but do not update the model."""

    @classmethod
    def of(
        cls,
        config: PretrainConfig | ClassifyConfig,
        model: nn.Module,
        parallel: nn.Module,
        steps_per_epoch: int,
        ema_decay: float | None = None,
        first_epoch: int = 0,
        start_lr: float = 0.0,
    ) -> "TrainState":
        """Build the state before the first step. `parallel` is `model` as `Rank.parallel` returned it.

        With `ema_decay`, an exponential moving average of the weights starts as a copy of the model. The schedule
        starts at `first_epoch` from `start_lr`, where a run that is extended ended.
        """
        peak = peak_lr(config.optim.base_lr, config.data.batch)
        return cls(
            model=parallel,
            optimizer=build_optimizer(model, config.optim, peak),
            schedule=schedule(config.optim, peak, steps_per_epoch, config.epochs, first_epoch, start_lr),
            clip_norm=config.optim.clip_norm,
            ema=None if ema_decay is None else copy.deepcopy(model).requires_grad_(False).eval(),
            ema_decay=ema_decay or 0.0,
        )

    def update(self) -> Tensor:
        """Apply the gradients at this step's learning rate if all are finite; count the step in any case.

        Return 1 on the device if a gradient was not finite, else 0, without synchronising. Every rank returns the same,
        since gradients are already summed over ranks.
        """
        apply_lr(self.optimizer, self.schedule.lr(self.step))
        with_grad = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(with_grad, self.clip_norm, norm)
        bad = (~norm.isfinite()).float()
        # The optimizers read found_inf on the device, as they do with a GradScaler, and skip the update if it is 1.
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            ema_update(self.ema, unwrapped(self.model), self.ema_decay)
        self.step += 1
        return bad

    def snapshot(self) -> Tensors:
        """Copy everything that a checkpoint saves to CPU memory."""
        found = {
            "model": copied(model_tensors(unwrapped(self.model))),
            "optimizer": copied(optimizer_tensors(self.optimizer, unwrapped(self.model))),
        }
        return found if self.ema is None else found | {"ema": copied(model_tensors(self.ema))}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of the checkpoint, bit for bit. Raises UserError if it is a checkpoint of another model."""
        _load(unwrapped(self.model), checkpoint, "model.safetensors")
        load_optimizer_tensors(self.optimizer, unwrapped(self.model), unpack(checkpoint.files["optimizer.safetensors"]))
        if self.ema is not None:
            _load(self.ema, checkpoint, "ema.safetensors")
        self.step = checkpoint.step


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to CPU memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _load(module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load one file of the checkpoint into the module. Raises UserError if names or shapes of tensors differ."""
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    tensors = unpack(checkpoint.files[name]) if name in checkpoint.files else {}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != wanted:
        key = min(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise UserError(
            f"{name} of the checkpoint of step {checkpoint.step} is of another model: {key} is "
            f"{found.get(key, 'absent')} in the checkpoint but {wanted.get(key, 'absent')} in this config's model; "
            "resume with the config that it was written with, or start again with --fresh"
        )
    module.load_state_dict(tensors)


def schedule(
    optim: OptimConfig, peak: float, steps_per_epoch: int, epochs: int, first_epoch: int = 0, start_lr: float = 0.0
) -> Schedule:
    """Return the learning-rate schedule of `epochs` from `first_epoch` on, in steps.

    This is the only place that converts its epochs to steps.
    """
    return Schedule(
        shape=optim.schedule,
        peak_lr=peak,
        min_lr=optim.min_lr,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        decay_steps=round(optim.decay_share * epochs * steps_per_epoch),
        total_steps=(first_epoch + epochs) * steps_per_epoch,
        first_step=first_epoch * steps_per_epoch,
        start_lr=start_lr,
    )


def warm_up(state: TrainState, batch: MicroBatch, loss_of: LossOf) -> None:
    """Run two discarded iterations, so that a resumed run sums gradients in the same order as an uninterrupted one.

    DDP rebuilds its buckets after the first backward pass. Without this, weights differ at three ranks and more.
    """
    for _ in range(2):
        (loss_of(state.model, batch, 0, 0) * 0.0).backward()
        state.optimizer.zero_grad(set_to_none=True)


def train_step(
    state: TrainState, rank: Rank, plan: StepPlan, batches: list[MicroBatch], loss_of: LossOf
) -> tuple[Tensor, Tensor]:
    """Do one optimizer step over this rank's micro-batches.

    Return this rank's share of the mean loss, and 1 if the update was skipped because the gradient is not finite, else
    0. Each rank's summed weighted loss is scaled by world size / planned samples, since DDP averages over ranks.
    """
    planned = plan.planned(state.step)
    total = torch.zeros((), device=rank.device)
    for i, batch in enumerate(batches):
        index = i * rank.world + rank.index
        if i + 1 < len(batches):
            with no_sync(state.model):
                loss = _backward(state, rank, batch, index, planned, loss_of)
        else:
            loss = _backward(state, rank, batch, index, planned, loss_of)
        total += loss
    return total / planned, state.update()


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
    after_step: AfterStep,
) -> None:
    """Train up to `last_step`, and call `after_step` after every step."""
    train_while(lambda step: step < last_step, state, rank, plan, feed, loss_of, after_step)


def train_while(
    has_step: Callable[[int], bool],
    state: TrainState,
    rank: Rank,
    plan: StepPlan,
    feed: Feed,
    loss_of: LossOf,
    after_step: AfterStep,
) -> None:
    """Train step by step as long as `has_step` returns True, and call `after_step` after every step."""
    per_rank = plan.micro_batches_per_step // rank.world
    started_s, first_step = time.time(), state.step
    with feed.clock.spent("steps"):
        while has_step(state.step):
            batches = [batch.to(rank.device) for batch in feed.take(state.step, per_rank)]
            if state.step in state.skipped_steps:
                state.step += 1
                after_step(state.step, None, None)
            else:
                loss, bad = train_step(state, rank, plan, batches, loss_of)
                after_step(state.step, loss, bad)
            if state.step == first_step + 1 and rank.is_main:
                note("first step, with its images", started_s)
