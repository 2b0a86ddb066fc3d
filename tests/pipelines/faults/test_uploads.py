"""A store that refuses a checkpoint for a while costs no step; one that refuses for good ends the run with the reason.

A training process of its own, a real S3 server, and a proxy before it that answers 503.
"""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import CheckpointConfig, TrackingConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.folder import RunFolder
from pipelines.worker.goodput import Clock
from pipelines.worker.loop import train
from pipelines.worker.meter import Due
from pipelines.worker.rank import Feed
from pipelines.worker.recorder import Recorder
from tests.pipelines.worker.test_loop import batches_of, loss_of, plan_of, rank_of, state_of
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, join, let_pass, wait_until

pytestmark = [pytest.mark.s3, pytest.mark.slow]
_SERVER: Any = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
SAVE_EVERY = 10


def work(uri: str, here: str, environment: dict[str, str], patience_s: float) -> None:
    """Train the run in the folder up to the step in the file `go`, and write the steps done to `done`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank, plan, folder, run = rank_of(0, 1), plan_of(1), Path(here), RunFolder(uri)
    state, checkpoint = state_of(rank), CheckpointConfig(every_epochs=SAVE_EVERY / 2, keep=2, patience_s=patience_s)
    recorder = Recorder(
        state=state,
        rank=rank,
        plan=plan,
        due=Due.of(checkpoint, TrackingConfig(log_every_steps=1), 2, 1000),
        folder=run,
        checkpoint=checkpoint,
        clock=Clock(),
    )

    def batches() -> Iterator[MicroBatch]:
        while True:
            wait_until(lambda: int((folder / "go").read_text() or 0) > state.step, "a further step", JOB_DEADLINE_S)
            yield from batches_of(plan, state.step, rank)
            (folder / "done").write_text(str(state.step + 1))

    try:
        train(state, rank, plan, Feed(batches()), 2000, loss_of, recorder.after_step)
    except OSError as error:
        (folder / "error").write_text(str(error))
        os._exit(1)


class Training:
    """A training process that is told how far to go."""

    def __init__(self, uri: str, here: Path, patience_s: float) -> None:
        self._here, self.run = here, RunFolder(uri)
        (here / "go").write_text("0")
        (here / "done").write_text("0")
        environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        self.process = _SERVER.Process(target=work, args=(uri, str(here), environment, patience_s))
        self.process.start()

    def go(self, step: int) -> None:
        """Wait until the process has taken that many steps."""
        (self._here / "go").write_text(str(step))
        done = self._here / "done"
        wait_until(lambda: int(done.read_text() or 0) >= step, f"step {step}", alive=self.process.is_alive)

    def saved(self, step: int) -> None:
        """Wait until an intact checkpoint of the step is committed."""
        steps, what = self.run.checkpoints.steps, f"the checkpoint of step {step}"
        wait_until(lambda: step in steps(), what, alive=self.process.is_alive, poll_every_s=0.1)
        self.run.checkpoints.verify(step)


@pytest.fixture
def training(tmp_path: Path, own_s3: Any, proxy: Any) -> Iterator[Any]:
    """Return a function that starts a training process."""
    started: list[Training] = []

    def start(patience_s: float) -> Training:
        proxy.reset(0.0, "503")
        started.append(Training(f"{own_s3.uri}/{tmp_path.name}/run", tmp_path, patience_s))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        join(one.process, KILLED_DEADLINE_S)


@pytest.fixture
def refused(training: Any, proxy: Any) -> Any:
    """Return a function that starts a training process and blocks all uploads after its first checkpoint."""

    def start(patience_s: float) -> Training:
        run = training(patience_s)
        run.go(SAVE_EVERY)
        run.saved(SAVE_EVERY)

        def is_quiet() -> bool:
            before = proxy.num_requests
            let_pass(1)
            return before == proxy.num_requests

        # The removal of older checkpoints, which follows the commit, must be over too.
        wait_until(is_quiet, "a second without requests")
        proxy.reset(1.0, "503")
        return run

    return start


@pytest.mark.parametrize("outage_s", [5, pytest.param(60, marks=pytest.mark.long)])
def test_training_goes_on_while_uploads_are_refused_and_the_snapshot_lands_afterwards(
    refused: Any, proxy: Any, outage_s: float
) -> None:
    run = refused(patience_s=300.0)
    run.go(2 * SAVE_EVERY - 1)
    let_pass(outage_s / 2)
    run.go(3 * SAVE_EVERY - 1)
    let_pass(outage_s / 2)
    assert proxy.num_spoiled == proxy.num_requests > 0
    # Two threads ask, each of them three times before a pause of 5 s at most.
    assert proxy.num_requests < 60 + 2 * outage_s
    proxy.reset(0.0, "503")
    run.saved(2 * SAVE_EVERY)
    run.go(3 * SAVE_EVERY)
    run.saved(3 * SAVE_EVERY)


def test_uploads_that_stay_refused_end_the_run_with_the_reason_and_the_checkpoint_before(
    refused: Any, proxy: Any, tmp_path: Path
) -> None:
    run = refused(patience_s=2.0)
    run.go(2 * SAVE_EVERY)
    (tmp_path / "go").write_text("1000")
    # Metrics that wait for the store at the end have a patience of their own, 120 s.
    join(run.process, JOB_DEADLINE_S)
    assert run.process.exitcode == 1
    proxy.reset(0.0, "503")
    said = (tmp_path / "error").read_text()
    assert said.startswith(f"the checkpoint of step {2 * SAVE_EVERY} could not be written within 2 s (")
    assert "the store gave no complete response" in said
    assert run.run.checkpoints.latest_step() == SAVE_EVERY
