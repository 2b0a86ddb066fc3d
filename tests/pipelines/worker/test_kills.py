"""A training process that is killed again and again, at random moments, ends as one that nobody disturbed.

Real processes and SIGKILL, without Ray: what is proved is the loop, the writer's thread and the store on a real disk.
"""

import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.state import unpack
from pipelines.config import CheckpointConfig, TrackingConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.folder import RunFolder
from pipelines.worker.goodput import Clock
from pipelines.worker.loop import train
from pipelines.worker.meter import Due
from pipelines.worker.rank import Feed
from pipelines.worker.recorder import Recorder
from tests.digest import tensors_digest
from tests.pipelines.worker.test_loop import batches_of, loss_of, plan_of, rank_of, state_of
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, join, let_pass, wait_until

STEPS = 60
_SERVER: Any = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__, "tests.pipelines.worker.test_loop"])


def work(folder: str, max_file_bytes: int | None = None, ends: bool = True) -> None:
    """Train the run in the folder to its last step, or wait before it if it must not end; every step saves."""
    torch.set_num_threads(1)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    rank, plan, run = rank_of(0, 1), plan_of(1), RunFolder(folder)
    state, clock = state_of(rank), Clock()
    recorder = Recorder(
        state=state,
        rank=rank,
        plan=plan,
        due=Due.of(CheckpointConfig(every_epochs=0.5), TrackingConfig(log_every_steps=1), 2, STEPS // 2),
        folder=run,
        checkpoint=CheckpointConfig(every_epochs=0.5, keep=2, patience_s=0),
        clock=clock,
    )
    newest = run.checkpoints.latest()
    if newest:
        recorder.resume(newest)

    def batches() -> Iterator[MicroBatch]:
        for step in range(state.step, STEPS):
            if step == STEPS - 1 and not ends:
                signal.pause()
            yield from batches_of(plan, step, rank)

    feed = Feed(batches())
    feed.clock = clock
    try:
        train(state, rank, plan, feed, STEPS, loss_of, recorder.after_step)
        recorder.finish()
    except OSError as error:
        (Path(folder) / "error.txt").write_text(str(error))
        os._exit(1)


def started(*args: object) -> Any:
    process = _SERVER.Process(target=work, args=args)
    process.start()
    return process


def newest_step(folder: Path) -> int:
    return max(RunFolder(str(folder)).checkpoints.steps(), default=0)


def wait_for_step(step: int, folder: Path, process: Any) -> None:
    """Wait until a checkpoint of that step or a later one is committed."""
    reached = f"step {step}"
    wait_until(lambda: newest_step(folder) >= step, reached, alive=process.is_alive, poll_every_s=0.002)


def digests(folder: Path) -> dict[str, str]:
    checkpoint = RunFolder(str(folder)).checkpoints.latest()
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return {name: tensors_digest(unpack(content)) for name, content in checkpoint.files.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = started(str(folder))
    join(process, JOB_DEADLINE_S)
    assert process.exitcode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path: Path, undisturbed: Path, num_kills: int) -> None:
    chance, moments = random.Random(num_kills), []
    for kill in range(num_kills):
        process = started(str(tmp_path), None, False)
        # Each life is long enough for a step and ends anywhere in the next one, its checkpoint or its deletions;
        # where the machine is so slow to tell that the run came to its last step meanwhile, it waits there.
        before = newest_step(tmp_path)
        wanted = before + (kill + 1) * (STEPS - 5) // num_kills - kill * (STEPS - 5) // num_kills
        wait_for_step(min(wanted, STEPS - 5), tmp_path, process)
        let_pass(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        join(process, KILLED_DEADLINE_S)
        assert process.exitcode == -signal.SIGKILL
        moments.append(newest_step(tmp_path))
    process = started(str(tmp_path))
    join(process, JOB_DEADLINE_S)
    assert process.exitcode == 0
    assert digests(tmp_path) == digests(undisturbed), f"killed after {moments}"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-{STEPS - 1:010d}", f"step-{STEPS:010d}"]
    assert not list((tmp_path / "checkpoints").rglob(".*"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_reason_and_costs_no_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    """RLIMIT_FSIZE refuses what is larger, as a full disk would."""
    process = started(str(tmp_path), None, False)
    wait_for_step(5, tmp_path, process)
    process.kill()
    join(process, KILLED_DEADLINE_S)
    before = newest_step(tmp_path)
    process = started(str(tmp_path), 20_000)
    join(process, JOB_DEADLINE_S)
    assert process.exitcode == 1
    assert "could not be written within 0 s" in (tmp_path / "error.txt").read_text()
    assert RunFolder(str(tmp_path)).checkpoints.latest_step() == before
    process = started(str(tmp_path))
    join(process, JOB_DEADLINE_S)
    assert digests(tmp_path) == digests(undisturbed)
