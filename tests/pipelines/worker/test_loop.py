"""The number of workers and the micro-batch share the work out, and change nothing else: in float64, to 1e-9."""

import copy
import dataclasses
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mae_core.augment import pixels_to_input
from mae_core.classifier import ProbeHead
from mae_core.config import ModelConfig, OptimConfig
from mae_core.masking import sample_masks
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.optim import build_optimizer
from mae_core.state import load_optimizer_tensors, model_tensors, optimizer_tensors, pack, unpack
from mae_core.step import pretrain_loss
from pipelines.config import ComputeConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan, Index
from pipelines.runs.checkpoints import Retention
from pipelines.runs.folder import RunFolder
from pipelines.worker import probing
from pipelines.worker.loop import TrainState, schedule, train, train_step, warm_up
from pipelines.worker.meter import Meter
from pipelines.worker.rank import Feed, Rank, unwrapped
from pipelines.worker.saving import CheckpointWriter
from tests.digest import tensors_digest

MODEL = ModelConfig(
    arch="vit_pico_patch4", image_px=(8, 8), channels=1, decoder_depth=1, decoder_width=16, decoder_heads=2
)
OPTIM = OptimConfig(base_lr=1e-2, warmup_epochs=0.0)
PIXELS = Normalization(mean=(0.5,), std=(0.25,))
NUM_SAMPLES, BATCH, EPOCHS = 26, 16, 3


def plan_of(num_workers: int, micro_batch: int = 4) -> EpochPlan:
    """Two steps an epoch, the second of ten samples: placeholders in it, and with three workers in both."""
    groups = np.arange(-(-NUM_SAMPLES // 5))
    index = Index(
        paths=("part",),
        shard=np.zeros_like(groups, dtype=np.int32),
        group=groups.astype(np.int32),
        first_id=groups.astype(np.int64) * 5,
        num_rows=np.minimum(5, NUM_SAMPLES - groups * 5).astype(np.int32),
    )
    return EpochPlan(
        index=index, seed=3, batch=BATCH, micro_batch=micro_batch, num_workers=num_workers, window=BATCH, shuffle=True
    )


def rank_of(index: int, world: int) -> Rank:
    return Rank(index=index, world=world, device=torch.device("cpu"), compute=ComputeConfig(num_workers=world))


def images_of(ids: np.ndarray) -> Tensor:
    """Return images, each a function of its id; placeholders are black."""
    found = torch.zeros(len(ids), 8, 8, 1, dtype=torch.uint8)
    for row, number in zip(found, ids.tolist()):
        if number >= 0:
            row[:] = torch.randint(0, 256, row.shape, generator=torch.Generator().manual_seed(number))
    return found


def batches_of(plan: EpochPlan, step: int, rank: Rank) -> list[MicroBatch]:
    """Return the micro-batches that the feed gives this rank."""
    ids = plan.step_ids(step, rank.index).reshape(-1, plan.micro_batch)
    return [
        MicroBatch(
            images=images_of(some),
            ids=torch.from_numpy(some),
            labels=torch.from_numpy(np.where(some >= 0, some % 3, -1)),
            weights=torch.from_numpy((some >= 0).astype(np.float32)),
            step=step,
            index=i * rank.world + rank.index,
        )
        for i, some in enumerate(ids)
    ]


def loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
    images = pixels_to_input(batch.images, PIXELS).double()
    mask = sample_masks(MODEL.mask, MODEL.grid, seed=1, epoch=step // 2, sample_ids=batch.ids)
    return pretrain_loss(model, images, mask, batch.weights.double())


def state_of(rank: Rank) -> TrainState:
    mae = build_mae(MODEL, seed=0).double()
    return TrainState(
        model=rank.parallel(mae),
        optimizer=build_optimizer(mae, OPTIM, 1e-2),
        schedule=schedule(OPTIM, 1e-2, 2, EPOCHS),
    )


def pretrained(rank: Rank, micro_batch: int = 4) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after three epochs, and this rank's share of each step's loss."""
    plan, state = plan_of(rank.world, micro_batch), state_of(rank)
    warm_up(state, MicroBatch.blank(micro_batch, MODEL.image_px, MODEL.channels), loss_of)
    losses = []
    while state.step < EPOCHS * plan.steps_per_epoch:
        batches = batches_of(plan, state.step, rank)
        loss, _ = train_step(state, rank, plan, batches, loss_of)
        losses.append(rank.sum(loss.double()).item())
    return model_tensors(unwrapped(state.model)), losses


def probed(rank: Rank) -> tuple[dict[str, Tensor], list[float]]:
    """Train a probe's head for three epochs on features that are the first twelve pixels."""
    plan = plan_of(rank.world)
    torch.manual_seed(0)
    head = ProbeHead(12, 3, head_std=0.5).double()
    optim = OptimConfig(name="lars", base_lr=0.1, warmup_epochs=0.0, weight_decay=0.0)
    state = TrainState(
        model=head, optimizer=build_optimizer(head, optim, 0.1), schedule=schedule(optim, 0.1, 2, EPOCHS)
    )
    losses: list[float] = []
    recorder = SimpleNamespace(after_step=lambda step, loss, bad: losses.append(rank.sum(loss.clone()).item()))
    job = SimpleNamespace(config=SimpleNamespace(augment=SimpleNamespace(label_smoothing=0.1)), classes=("a", "b", "c"))

    def examples_of(step: int) -> probing.Examples:
        batches = batches_of(plan, step, rank)
        return probing.Examples(
            torch.cat([b.images.reshape(len(b.images), -1)[:, :12].double() / 255 for b in batches]),
            torch.cat([b.labels for b in batches]),
            torch.cat([b.weights for b in batches]).double(),
        )

    fit: Any = probing._fit
    fit(job, rank, plan, state, recorder, EPOCHS * plan.steps_per_epoch, examples_of)
    return model_tensors(head), losses


def assert_equal(found: tuple[dict[str, Tensor], list[float]], wanted: tuple[dict[str, Tensor], list[float]]) -> None:
    """All weights as one vector differ by 1e-9 of its length at most.

    Taken one by one, they need not: a key's bias has no gradient but rounding, which Adam makes as large as any.
    """
    assert found[0].keys() == wanted[0].keys()
    one, other = (
        torch.cat([tensors[name].double().flatten() for name in wanted[0]]) for tensors in (found[0], wanted[0])
    )
    assert ((one - other).norm() / other.norm()).item() < 1e-9
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 8, 16])
def test_accumulated_gradients_are_those_of_one_large_batch(micro_batch: int) -> None:
    assert_equal(pretrained(rank_of(0, 1), micro_batch), pretrained(rank_of(0, 1)))


def save(state: TrainState, folder: RunFolder) -> None:
    """Commit a checkpoint of the state."""
    writer = CheckpointWriter(folder.checkpoints, Retention(newest=2), patience_s=0, before=lambda: None)
    writer.save(state.step, state.snapshot, {})
    writer.wait()


def resumed(rank: Rank, folder: RunFolder, stop: int) -> tuple[str, str]:
    """Digests of weights and optimizer state, in float32, of an undisturbed run and of one that starts anew at `stop`.

    As after a kill, the second has another DDP wrapper and optimizer and knows the checkpoint alone.
    """
    plan, digests = plan_of(rank.world), []
    last = EPOCHS * plan.steps_per_epoch
    for first in (0, stop):
        mae = build_mae(MODEL, seed=0)
        state = TrainState(
            model=rank.parallel(mae),
            optimizer=build_optimizer(mae, OPTIM, 1e-2),
            schedule=schedule(OPTIM, 1e-2, 2, EPOCHS),
        )
        warm_up(state, MicroBatch.blank(4, MODEL.image_px, MODEL.channels), single_loss_of)
        if first:
            state.restore(folder.checkpoints.load(first))
        while state.step < last:
            train_step(state, rank, plan, batches_of(plan, state.step, rank), single_loss_of)
            if not first and state.step == stop and rank.is_main:
                save(state, folder)
        rank.barrier()
        digests.append(tensors_digest(model_tensors(mae) | optimizer_tensors(state.optimizer, mae)))
    return digests[0], digests[1]


def reduced(rank: Rank, **compute: Any) -> Tensor:
    """Gradients of the first step on every rank, of shape [rank, values]."""
    rank = dataclasses.replace(rank, compute=ComputeConfig(num_workers=rank.world, **compute))
    state, plan, found = state_of(rank), plan_of(rank.world), []

    def record(*_: object) -> None:
        found.append(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]))

    state.optimizer.register_step_pre_hook(record)
    train_step(state, rank, plan, batches_of(plan, 0, rank), loss_of)
    return torch.stack(rank.gather(found[0]))


def single_loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
    images = pixels_to_input(batch.images, PIXELS)
    mask = sample_masks(MODEL.mask, MODEL.grid, seed=1, epoch=step // 2, sample_ids=batch.ids)
    return pretrain_loss(model, images, mask, batch.weights)


def pending_of(rank: Rank) -> list[dict[str, Any]]:
    """Return what a checkpoint keeps of the next log point, and what a group that restored it would keep."""
    first, second = Meter(rank), Meter(rank)
    first.add(1, torch.tensor(0.5**rank.index), torch.tensor(0.0), 4)
    first.bad_steps()
    kept = first.pending()
    second.restore(kept)
    return [kept, second.pending()]


def _on_rank(index: int, folder: str) -> None:
    """Pretrains, resumes and probes on three ranks, then on two of them; rank 0 leaves what came out in the folder."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if index >= world:
            return
        store = dist.FileStore(f"{folder}/store-{world}", world)
        dist.init_process_group("gloo", store=store, rank=index, world_size=world, timeout=timedelta(seconds=120))
        rank = rank_of(index, world)
        try:
            run = RunFolder(f"{folder}/run-{world}")
            found = {
                "pretrain": pretrained(rank),
                "probe": probed(rank),
                "resumed": [resumed(rank, run, stop) for stop in (1, 4)],
                "pending": pending_of(rank),
                "float32": reduced(rank),
                "bfloat16": reduced(rank, reduce_in="bfloat16", bucket_mib=1),
            }
        except BaseException:
            traceback.print_exc()
            raise
        if rank.is_main:
            torch.save(found, f"{folder}/{world}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Return the results of real gloo groups of two and three processes, by size."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_on_rank, (str(folder),), nprocs=3)  # pyright: ignore[reportPrivateImportUsage]
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_one_worker_equals_several_in_pretraining_and_probing(together: dict[int, Any], world: int) -> None:
    assert_equal(together[world]["pretrain"], pretrained(rank_of(0, 1)))
    assert_equal(together[world]["probe"], probed(rank_of(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_resumed_group_equals_an_undisturbed_one_bit_for_bit(together: dict[int, Any], world: int) -> None:
    for undisturbed, again in together[world]["resumed"]:
        assert undisturbed == again


@pytest.mark.slow
def test_each_rank_continues_its_own_sum_of_losses(together: dict[int, Any]) -> None:
    for world, losses in ((2, [1.0, 0.5]), (3, [1.0, 0.5, 0.25])):
        assert together[world]["pending"] == [{"loss": losses, "steps": 1}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_summed_in_bfloat16_are_equal_on_all_ranks_and_near_the_exact_ones(
    together: dict[int, Any], world: int
) -> None:
    exact, rounded = together[world]["float32"], together[world]["bfloat16"]
    assert (exact == exact[0]).all()
    assert (rounded == rounded[0]).all()
    error = ((rounded - exact)[0].norm() / exact[0].norm()).item()
    assert 0 < error < 2**-7


def test_the_weights_of_placeholders_are_nothing() -> None:
    """Three ranks' micro-batches of a step on one rank: the two that were padded change no bit."""
    plan, padded = plan_of(1), plan_of(3)
    weights = []
    for each, world in ((plan, 1), (padded, 3)):
        state, batches = state_of(rank_of(0, 1)), []
        for batch in zip(*(batches_of(each, 1, rank_of(r, world)) for r in range(world)), strict=True):
            batches += batch
        state.step = 1
        train_step(state, rank_of(0, 1), each, batches, loss_of)
        weights.append(tensors_digest(model_tensors(state.model)))
    assert weights[0] == weights[1]


def digests_of(state: TrainState) -> dict[str, str]:
    """One digest for each file of a checkpoint."""
    return {name: tensors_digest(tensors) for name, tensors in state.snapshot().items()}


@pytest.mark.parametrize("ema", [False, True])
def test_a_restored_state_goes_on_as_the_saved_one_would_have(tmp_path: Path, ema: bool) -> None:
    rank, plan = rank_of(0, 1), plan_of(1)
    folder = RunFolder(str(tmp_path))

    def start() -> TrainState:
        state = state_of(rank)
        if ema:
            state.ema, state.ema_decay = copy.deepcopy(state.model).requires_grad_(False), 0.5
        return state

    state = start()
    feed = Feed(batch for step in range(6) for batch in batches_of(plan, step, rank))
    train(state, rank, plan, feed, 3, loss_of, lambda step, loss, bad: None)
    save(state, folder)
    train(state, rank, plan, feed, 6, loss_of, lambda step, loss, bad: None)

    again = start()
    checkpoint = folder.checkpoints.latest()
    assert checkpoint is not None
    again.restore(checkpoint)
    assert again.step == 3
    feed = Feed(batch for step in range(3, 6) for batch in batches_of(plan, step, rank))
    train(again, rank, plan, feed, 6, loss_of, lambda step, loss, bad: None)
    assert digests_of(again) == digests_of(state)


def test_optimizer_state_of_another_model_is_refused() -> None:
    state = state_of(rank_of(0, 1))
    train_step(state, rank_of(0, 1), plan_of(1), batches_of(plan_of(1), 0, rank_of(0, 1)), loss_of)
    tensors = unpack(pack(optimizer_tensors(state.optimizer, state.model)))
    other = build_mae(dataclasses.replace(MODEL, decoder_width=32), seed=0).double()
    with pytest.raises(ValueError, match="belongs to another model"):
        load_optimizer_tensors(build_optimizer(other, OPTIM, 1e-2), other, tensors)


def test_a_feed_at_another_step_is_noticed() -> None:
    rank, plan = rank_of(0, 1), plan_of(1)
    feed = Feed(iter(batches_of(plan, 1, rank)))
    with pytest.raises(AssertionError, match="the feed is at step 1, the training state at 0"):
        list(feed.take(0, 4))
    with pytest.raises(AssertionError, match="ended before step 0"):
        list(Feed(iter([])).take(0, 1))


def test_gradients_are_shortened_where_the_config_says_so() -> None:
    rank, plan = rank_of(0, 1), plan_of(1)
    state = state_of(rank)
    state.clip_norm = 1e-3
    norms: list[float] = []

    def record_norm(*_: object) -> None:
        gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    state.optimizer.register_step_pre_hook(record_norm)
    train_step(state, rank, plan, batches_of(plan, 0, rank), loss_of)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step(tmp_path: Path) -> None:
    rank, plan = rank_of(0, 1), plan_of(1)
    for clip_norm in (None, 1.0):
        state = state_of(rank)
        state.clip_norm = clip_norm
        for step in range(2):
            train_step(state, rank, plan, batches_of(plan, step, rank), loss_of)
        before = digests_of(state)
        _, bad = train_step(state, rank, plan, batches_of(plan, 2, rank), infinite_loss_of)
        assert (bad.item(), state.step, digests_of(state)) == (1.0, 3, before)
        _, bad = train_step(state, rank, plan, batches_of(plan, 3, rank), loss_of)
        assert bad.item() == 0.0
        assert digests_of(state) != before


def infinite_loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
    return loss_of(model, batch, step, index) * float("inf")


def test_a_step_that_is_left_out_is_read_and_not_learnt_from() -> None:
    rank, plan = rank_of(0, 1), plan_of(1)
    state = state_of(rank)
    state.skipped_steps = frozenset({0, 2})
    seen: list[tuple[int, bool]] = []
    feed = Feed(batch for step in range(4) for batch in batches_of(plan, step, rank))
    train(state, rank, plan, feed, 4, loss_of, lambda step, loss, bad: seen.append((step, loss is None)))
    assert seen == [(1, True), (2, False), (3, True), (4, False)]
    by_hand = state_of(rank)
    for step in (1, 3):
        by_hand.step = step
        train_step(by_hand, rank, plan, batches_of(plan, step, rank), loss_of)
    assert digests_of(by_hand) == digests_of(state)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    save(state_of(rank_of(0, 1)), folder)
    wider = build_mae(dataclasses.replace(MODEL, decoder_width=32), seed=0).double()
    state = TrainState(wider, build_optimizer(wider, OPTIM, 1e-2), schedule(OPTIM, 1e-2, 2, EPOCHS))
    with pytest.raises(ValueError, match=r"checkpoint of step 0 is of another model: decoder.* is .*16.* resume with"):
        state.restore(folder.checkpoints.load(0))


def test_nothing_depends_on_the_state_of_the_global_generators() -> None:
    """So no such state need be saved: a resumed run would have another."""
    rank, plan, found = rank_of(0, 1), plan_of(1), []
    for noise in range(2):
        state = state_of(rank)
        for step in range(3):
            torch.manual_seed(noise * 100 + step)
            np.random.seed(noise * 100 + step)
            train_step(state, rank, plan, batches_of(plan, step, rank), loss_of)
        found.append(digests_of(state))
    assert found[0] == found[1]
