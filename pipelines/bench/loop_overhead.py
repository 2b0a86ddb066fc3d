"""Overhead of the training loop over the bare step: reading the feed, metrics, checkpoints, checks of the gradient.

    python -m pipelines.bench.loop_overhead

Rounds of both kinds alternate, so that a disturbance of the machine affects both.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from mae_core.augment import pixels_to_input
from mae_core.config import ModelConfig, OptimConfig
from mae_core.masking import sample_masks
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.schedule import apply_lr
from mae_core.step import pretrain_loss
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig, TrackingConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan, Index
from pipelines.runs.folder import RunFolder
from pipelines.worker.loop import TrainState, train
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.recorder import Recorder

MODEL = ModelConfig(arch="vit_tiny_patch8", image_px=(64, 64), decoder_depth=2, decoder_width=128, decoder_heads=4)
BATCH, STEPS_PER_ROUND, ROUNDS = 32, 5, 10
PIXELS = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
    """Compute the summed pretraining loss of a micro-batch."""
    mask = sample_masks(MODEL.mask, MODEL.grid, seed=0, epoch=0, sample_ids=batch.ids)
    return pretrain_loss(model, pixels_to_input(batch.images, PIXELS), mask, batch.weights)


def plan() -> EpochPlan:
    """Return a plan whose epoch is one round."""
    rows = BATCH * STEPS_PER_ROUND
    index = Index(
        paths=("part",),
        shard=np.zeros(1, dtype=np.int32),
        group=np.zeros(1, dtype=np.int32),
        first_id=np.zeros(1, dtype=np.int64),
        num_rows=np.array([rows], dtype=np.int32),
    )
    return EpochPlan(index=index, seed=0, batch=BATCH, micro_batch=BATCH, num_workers=1, window=rows)


def blank(step: int) -> MicroBatch:
    """Return a batch of random pixels with weight 1."""
    found = MicroBatch.blank(BATCH, MODEL.image_px, MODEL.channels)
    found.images.random_(0, 256)
    found.weights.fill_(1.0)
    found.ids.copy_(torch.arange(BATCH))
    return MicroBatch(found.images, found.ids, found.labels, found.weights, step=step, index=0)


def bare_round(state: TrainState, first: int) -> None:
    """Run one round of bare steps: forward, backward, optimizer."""
    batch = blank(first)
    for step in range(first, first + STEPS_PER_ROUND):
        loss = loss_of(state.model, batch, step, 0) / BATCH
        loss.backward()
        apply_lr(state.optimizer, state.schedule.lr(step))
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)


def state_of(config: PretrainConfig) -> TrainState:
    mae = build_mae(MODEL, seed=0)
    return TrainState.of(config, mae, mae, STEPS_PER_ROUND)


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Time the action; return wall-clock seconds and CPU seconds of this process."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def measure(folder: str) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Alternate rounds of the bare step and of the loop; yield (wall, CPU) seconds of each pair, without the first."""
    config = PretrainConfig(
        epochs=1000,
        data=DataConfig(batch=BATCH, micro_batch=BATCH),
        model=MODEL,
        optim=OptimConfig(warmup_epochs=0.0),
        checkpoint=CheckpointConfig(every_epochs=10),
        tracking=TrackingConfig(log_every_steps=10, pictures_every_epochs=1000),
    )
    rank = Rank(index=0, world=1, device=torch.device("cpu"), compute=ComputeConfig())
    bare, looped, epoch = state_of(config), state_of(config), plan()
    batch = blank(0)
    stream = (
        MicroBatch(batch.images, batch.ids, batch.labels, batch.weights, step=step, index=0) for step in range(10**9)
    )
    feed = Feed(stream)
    recorder = Recorder.of(config, looped, rank, epoch, RunFolder(folder), feed.clock)
    for i in range(ROUNDS + 1):
        first, last = i * STEPS_PER_ROUND, (i + 1) * STEPS_PER_ROUND
        one = timed(partial(bare_round, bare, first))
        other = timed(partial(train, looped, rank, epoch, feed, last, loss_of, recorder.after_step))
        if i:
            yield one, other
    recorder.finish()


def main() -> None:
    """Print the median step time and the median ratio of the pairs."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        found = list(measure(folder))
    for kind, name in enumerate(("wall", "CPU time")):
        step_s = statistics.median(one[kind] for one, _ in found) / STEPS_PER_ROUND
        ratios = sorted(other[kind] / one[kind] for one, other in found)
        spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        print(
            f"{name}: bare step {1000 * step_s:.0f} ms, loop / bare {statistics.median(ratios):.3f} "
            f"(median of {len(ratios)} paired rounds of {STEPS_PER_ROUND} steps; middle half {spread})"
        )


if __name__ == "__main__":
    main()
