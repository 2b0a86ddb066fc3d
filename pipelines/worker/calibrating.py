"""Measure the steps of a job's model on one device, for an estimate of the run."""

import time
from dataclasses import dataclass

import torch

from mae_core.config import Size
from mae_core.model import build_mae
from mae_core.state import pack
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import IndexedDataset, train_plan
from pipelines.worker.loop import LossOf, TrainState, warm_up
from pipelines.worker.pretraining import loss_function
from pipelines.worker.rank import Rank


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on one device."""

    micro_batch_s: float
    """Forward and backward pass of one micro-batch, on average over the epochs if images grow."""
    update_s: float
    """One step of the optimizer."""
    checkpoint_bytes: int
    export_bytes: int


def calibrate(job: PretrainJob, dataset: IndexedDataset, seconds: float) -> Calibration:
    """Run micro-batches of blank images as a rank would, for about `seconds`, and count what a checkpoint holds."""
    torch.set_num_threads(job.compute.threads)
    rank = Rank(index=0, world=1, device=torch.device("cuda" if job.compute.gpu else "cpu"), compute=job.compute)
    plan, reading = train_plan(job, dataset), job.reading
    mae = build_mae(job.config.model, job.config.seed)
    if mae.basis is not None:
        # Any components do: those of the images take time to fit.
        mae.basis.load_state_dict({name: torch.zeros_like(values) for name, values in mae.basis.state_dict().items()})
    state = TrainState.of(reading, mae, rank.parallel(mae), plan.steps_per_epoch, job.config.ema_decay)
    mae.add_sizes(size for _, size in job.stages[:-1])
    loss_of = loss_function(job, plan.steps_per_epoch, rank)
    starts = [epoch - job.first_epoch for epoch, _ in job.stages]
    micro_batch_s = update_s = 0.0
    for (_, size), start, stop in zip(job.stages, starts, [*starts[1:], reading.epochs], strict=True):
        share = (stop - start) / reading.epochs
        passing_s, updating_s = _measured(job, state, rank, size, plan, seconds / len(starts), loss_of)
        micro_batch_s, update_s = micro_batch_s + share * passing_s, update_s + share * updating_s
    snapshot = state.snapshot()
    encoder_bytes = sum(p.numel() * p.element_size() for p in mae.encoder.parameters())
    return Calibration(
        micro_batch_s=micro_batch_s,
        update_s=update_s,
        checkpoint_bytes=sum(t.numel() * t.element_size() for part in snapshot.values() for t in part.values()),
        export_bytes=len(pack(snapshot["model"])) + encoder_bytes,
    )


def _measured(
    job: PretrainJob, state: TrainState, rank: Rank, size: Size, plan: EpochPlan, seconds: float, loss_of: LossOf
) -> tuple[float, float]:
    """Measure steps of images of this size; return the seconds of a micro-batch and of an update."""
    crops, channels, in_float = job.config.crops_per_image, job.config.model.channels, job.pixels.values is not None
    batch = MicroBatch.blank(plan.micro_batch, size, channels, crops, in_float=in_float).to(rank.device)
    warm_up(state, batch, loss_of)
    _settle(rank)
    micro_batches = updates = 0
    passing_s = updating_s = 0.0
    while passing_s + updating_s < seconds or updates < 2:
        started_s = passed_s = time.perf_counter()
        # A step of many micro-batches may take longer than all the time.
        for _ in range(plan.micro_batches_per_step // job.compute.num_workers):
            loss_of(state.model, batch, state.step, micro_batches).backward()
            _settle(rank)
            micro_batches, passed_s = micro_batches + 1, time.perf_counter()
            if passed_s - started_s > seconds / 4:
                break
        state.update()
        _settle(rank)
        updates, passing_s = updates + 1, passing_s + passed_s - started_s
        updating_s += time.perf_counter() - passed_s
    return passing_s / micro_batches, updating_s / updates


def _settle(rank: Rank) -> None:
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
