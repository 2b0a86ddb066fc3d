"""What happens after a step: what is due, and what a gradient that is not finite leads to."""

import contextlib
import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.state import unpack
from pipelines.config import CheckpointConfig, TrackingConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.folder import RunFolder
from pipelines.worker.goodput import KINDS, Clock
from pipelines.worker.loop import TrainState, train
from pipelines.worker.meter import Due, Meter, retention
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.recorder import Recorder, RolledBack, Stopped
from pipelines.worker.stop_gate import StopRequested
from tests.pipelines.worker.test_loop import EPOCHS, batches_of, digests_of, loss_of, plan_of, rank_of, state_of

BAD = 3
"""The step, counted from 0, whose gradient is not finite."""


def test_what_is_due_is_due_at_the_last_step_too() -> None:
    due = Due.of(CheckpointConfig(every_epochs=0.5), TrackingConfig(log_every_steps=4, pictures_every_epochs=2), 9, 3)
    assert [s for s in range(1, 28) if due.log(s)] == [4, 8, 12, 16, 20, 24, 27]
    assert [s for s in range(1, 28) if due.save(s)] == [4, 8, 12, 16, 20, 24, 27]
    assert [s for s in range(1, 28) if due.picture(s)] == [18, 27]


def test_evaluations_are_due_every_few_epochs_and_at_the_last_step() -> None:
    due = Due.of(CheckpointConfig(), TrackingConfig(), 9, 5, 2)
    assert [s for s in range(1, 46) if due.evaluate(s)] == [18, 36, 45]
    assert (due.num_evaluations(), due.num_evaluations(27), due.num_evaluations(36)) == (3, 2, 2)
    never = Due.of(CheckpointConfig(), TrackingConfig(), 9, 5)
    assert not any(map(never.evaluate, range(46)))
    assert never.num_evaluations() == 0


def test_epochs_of_the_policy_become_steps() -> None:
    policy = retention(CheckpointConfig(keep=3, keep_best=1, keep_every_epochs=10), 7)
    assert (policy.newest, policy.best, policy.every_steps) == (3, 1, 70)


def loss_then_nan(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
    return loss_of(model, batch, step, index) * (float("nan") if step == BAD else 1.0)


def run(folder: RunFolder, policy: str, log_every_steps: int = 1) -> TrainState:
    """Six steps from the newest checkpoint on, of which the fourth has no finite gradient."""
    rank, plan = rank_with(policy), plan_of(1)
    state, checkpoint, clock = state_of(rank), CheckpointConfig(every_epochs=0.5, keep=2), Clock()
    recorder = Recorder(
        state=state,
        rank=rank,
        plan=plan,
        due=Due.of(checkpoint, TrackingConfig(log_every_steps=log_every_steps), 2, EPOCHS),
        folder=folder,
        checkpoint=checkpoint,
        clock=clock,
    )
    newest = folder.checkpoints.latest()
    if newest:
        recorder.resume(newest)
    feed = Feed(batch for step in range(state.step, 6) for batch in batches_of(plan, step, rank))
    feed.clock = clock
    train(state, rank, plan, feed, 6, loss_then_nan, recorder.after_step)
    recorder.finish()
    return state


def rank_with(policy: str) -> Rank:
    rank = rank_of(0, 1)
    return dataclasses.replace(rank, compute=dataclasses.replace(rank.compute, on_nan=policy))


@pytest.mark.parametrize("log_every_steps", [1, 6])
def test_stop_ends_the_run_with_the_sample_ids_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, log_every_steps: int
) -> None:
    folder = RunFolder(str(tmp_path))
    ids = sorted(i for i in plan_of(1).step_ids(BAD).tolist() if i >= 0)
    with pytest.raises(Stopped, match=rf"not finite at step {BAD + 1}, whose 10 samples .*; try a lower") as stopped:
        run(folder, "stop", log_every_steps)
    assert folder.stop_reason() == str(stopped.value)
    newest = folder.checkpoints.latest()
    assert newest is not None
    assert newest.step == BAD
    assert all(tensor.isfinite().all() for tensor in unpack(newest.files["model.safetensors"]).values())
    named = json.loads(folder.storage.read(f"bad_steps/{BAD + 1:010d}.json"))
    assert sorted(named["ids"]) == ids
    assert all(str(i) in str(stopped.value) for i in ids)
    folder.clear_stop_reason()
    assert not folder.stop_reason()


@pytest.mark.parametrize("num_steps", [0, 3, 4])
def test_a_stop_saves_the_present_step_once(tmp_path: Path, num_steps: int) -> None:
    """Checkpoints are due every second step."""
    folder, rank, plan = RunFolder(str(tmp_path)), rank_of(0, 1), plan_of(1)
    state, checkpoint, clock = state_of(rank), CheckpointConfig(every_epochs=1.0, keep=9), Clock()
    due = Due.of(checkpoint, TrackingConfig(log_every_steps=1), 2, EPOCHS)
    recorder = Recorder(state=state, rank=rank, plan=plan, due=due, folder=folder, checkpoint=checkpoint, clock=clock)

    def enter_step() -> None:
        if state.step == num_steps:
            raise StopRequested

    feed = Feed((batch for step in range(6) for batch in batches_of(plan, step, rank)), enter_step)
    with pytest.raises(StopRequested), recorder.saving_if_stopped():
        train(state, rank, plan, feed, 6, loss_of, recorder.after_step)
    assert folder.checkpoints.steps() == {0: [], 3: [2, 3], 4: [2, 4]}[num_steps]
    newest = folder.checkpoints.latest()
    if newest is not None:
        assert newest.meta["last"]["epoch"] == num_steps / 2
        restored = state_of(rank)
        restored.restore(newest)
        assert digests_of(restored) == digests_of(state)


def test_skip_goes_on_as_if_the_step_had_no_gradient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = run(RunFolder(str(tmp_path)), "skip")
    assert f"not finite at step {BAD + 1}" in caplog.text
    assert "the step is skipped" in caplog.text
    rank, plan, by_hand = rank_of(0, 1), plan_of(1), state_of(rank_of(0, 1))
    by_hand.skipped_steps = frozenset({BAD})
    feed = Feed(batch for step in range(6) for batch in batches_of(plan, step, rank))
    train(by_hand, rank, plan, feed, 6, loss_of, lambda step, loss, bad: None)
    assert digests_of(found) == digests_of(by_hand)


def test_roll_back_leaves_out_what_lies_between_the_newest_checkpoint_and_the_bad_step(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    with pytest.raises(RolledBack, match=f"not finite at step {BAD + 1}"):
        run(folder, "roll_back")
    assert folder.read_skipped_steps() == {BAD}
    assert not folder.stop_reason()
    found = run(folder, "roll_back")
    assert found.step == 6
    assert digests_of(found) == digests_of(run(RunFolder(str(tmp_path / "other")), "skip"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    one, other = RunFolder(str(tmp_path / "one")), RunFolder(str(tmp_path / "other"))
    for folder in (one, other):
        folder.claim({"kind": "pretrain"})
    run(one, "skip")
    newest = one.checkpoints.latest()
    assert newest is not None
    other.checkpoints.save(newest, retention(CheckpointConfig(), 2))
    with pytest.raises(ValueError, match=r"checkpoint of step 6 in .*other was written by another run; remove it"):
        run(other, "skip")


@pytest.mark.parametrize(("split", "kept"), [("val", [1, 3]), ("test", [2, 3])])
def test_accuracy_on_val_and_on_nothing_else_decides_which_checkpoint_is_best(
    tmp_path: Path, split: str, kept: list[int]
) -> None:
    rank, plan, folder = rank_of(0, 1), plan_of(1), RunFolder(str(tmp_path))
    state, checkpoint = state_of(rank), CheckpointConfig(every_epochs=0.5, keep=1, keep_best=1)
    due = Due.of(checkpoint, TrackingConfig(log_every_steps=1), 2, EPOCHS)
    recorder = Recorder(state=state, rank=rank, plan=plan, due=due, folder=folder, checkpoint=checkpoint, clock=Clock())
    for step, (top1, loss) in enumerate([(90.0, 0.9), (10.0, 0.1), (20.0, 0.5)], 1):
        recorder.last["train/loss"] = loss
        recorder.writer.save(step, state.snapshot, {"last": dict(recorder.last)})
        recorder.record_accuracy(step, split, {f"{split}/top1": top1})
    recorder.finish()
    assert folder.checkpoints.steps() == kept


@pytest.mark.slow
def test_every_point_says_where_the_time_went(tmp_path: Path) -> None:
    run(RunFolder(str(tmp_path)), "skip")
    lines = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    for line in lines:
        shares = {key: value for key, value in line["values"].items() if key.startswith("goodput/")}
        assert set(shares) == {f"goodput/{kind}" for kind in KINDS}
        assert sum(shares.values()) == pytest.approx(1)
    assert lines[-1]["values"]["goodput/steps"] > 0


def losses_logged(folder: RunFolder, stops: list[int]) -> dict[int, float]:
    """Return the losses logged every fourth step of six, of a run that is stopped after some steps and resumed."""
    rank, plan, checkpoint = rank_of(0, 1), plan_of(1), CheckpointConfig(every_epochs=1.5, keep=9)
    due = Due.of(checkpoint, TrackingConfig(log_every_steps=4), 2, EPOCHS)
    for stop in [*stops, 6]:
        state, clock = state_of(rank), Clock()
        parts = {"state": state, "rank": rank, "plan": plan, "due": due, "folder": folder, "clock": clock}
        recorder = Recorder(**parts, checkpoint=checkpoint)
        newest = folder.checkpoints.latest()
        if newest:
            recorder.resume(newest)

        def enter_step(state: TrainState = state, stop: int = stop) -> None:
            if state.step == stop < 6:
                raise StopRequested

        batches = (batch for step in range(state.step, 6) for batch in batches_of(plan, step, rank))
        feed = Feed(batches, enter_step)
        feed.clock = clock
        with contextlib.suppress(StopRequested), recorder.saving_if_stopped():
            train(state, rank, plan, feed, 6, loss_of, recorder.after_step)
            recorder.finish()
    lines = [
        json.loads(line) for path in Path(folder.storage.uri).rglob("*.jsonl") for line in path.read_text().splitlines()
    ]
    return {line["step"]: line["values"]["train/loss"] for line in lines}


@pytest.mark.parametrize("stops", [[3], [1, 2], [5]])
def test_the_mean_loss_of_a_log_point_knows_the_steps_before_a_restart(tmp_path: Path, stops: list[int]) -> None:
    wanted = losses_logged(RunFolder(str(tmp_path / "undisturbed")), [])
    assert sorted(wanted) == [4, 6]
    assert losses_logged(RunFolder(str(tmp_path / "stopped")), stops) == wanted


def test_a_smaller_group_continues_the_sum_of_a_larger_one() -> None:
    meter = Meter(rank_of(0, 1))
    meter.restore({"loss": [0.5, 0.25, 1.0], "steps": 1})
    assert meter.pending() == {"loss": [1.75], "steps": 1}
    meter.add(2, torch.tensor(0.25), torch.tensor(0.0), 10)
    assert meter.bad_steps() == []
    assert meter.drain()["train/loss"] == 1.0
    assert meter.pending() == {}
