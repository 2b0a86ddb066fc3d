"""Each training runs once, whatever is killed and however many reconcilers look at the same time."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines.handoff.executors import Here
from pipelines.handoff.jobs_file import Training
from pipelines.handoff.ledger import Claim, End, Ledger, Process
from pipelines.handoff.reconcile import Limits, Status, forgive, reconcile, summary
from pipelines.storage import open_storage
from tests.pipelines.handoff.killing import kill_at
from tests.waiting import COMMAND_DEADLINE_S, wait_until

# Python 3.12 and newer warn of a fork beside threads, of which the child uses none.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
STAND_IN = (sys.executable, "-m", "tests.pipelines.handoff.stand_in")
GONE = Process(host=Process.this().host, pid=2**22 + 1, started="0")


class World:
    """Trainings that take no time, their ledger, and what the processes noted."""

    def __init__(self, folder: Path) -> None:
        self.output, self.diary = open_storage(folder / "runs"), folder / "diary"
        self.diary.mkdir()
        self.wake = threading.Event()

    def training(self, name: str, what: str = "finish") -> Training:
        about = {"version": "models:/mae/1", "digest": "", "experiment": "mae"}
        return Training(job=name, name=name, words=(str(self.diary), what), **about)

    def here(self) -> Here:
        return Here(self.wake, STAND_IN)

    def look(self, trainings: list[Training], here: Here, max_running: int = 1, retry_s: float = 0.0) -> list[Status]:
        limits = Limits(max_running=max_running, max_attempts=3, retry_s=retry_s)
        return reconcile(trainings, self.output, limits, here, lambda training: False)

    def finish(self, trainings: list[Training], max_running: int = 1) -> list[Status]:
        """Look until nothing runs."""
        here = self.here()
        found = self.look(trainings, here, max_running)

        def is_done() -> bool:
            nonlocal found
            found = self.look(trainings, here, max_running)
            return not {"running", "waiting"} & {status.state for status in found} and not here.num_children

        wait_until(is_done, lambda: f"the end of {found}", COMMAND_DEADLINE_S, poll_every_s=0.05)
        return found

    def ran(self, name: str) -> list[str]:
        """Return the numbers of the attempts that did the work."""
        return [line.split()[0] for line in self._diary(name)]

    def most_at_a_time(self) -> int:
        lines = [line for path in self.diary.glob("*.ran") for line in self._diary(path.stem)]
        return max(int(line.split()[1]) for line in lines)

    def _diary(self, name: str) -> list[str]:
        path = self.diary / f"{name}.ran"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def in_a_fork(work: "object", number: int = 0) -> int:
    """Call `work` in a copy of this process that is killed at that point, if it gets there; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            if number:
                kill_at(number)
            work()  # pyright: ignore[reportCallIssue]
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_trainings_run_once_in_order_and_within_the_limit(world: World) -> None:
    trainings = [world.training(name) for name in ("a", "b", "c", "d")]
    here = world.here()
    assert [status.state for status in world.look(trainings, here, 2)] == ["running", "running", "waiting", "waiting"]
    statuses = world.finish(trainings, 2)
    assert {status.state for status in statuses} == {"finished"}
    assert statuses[0].said == "models:/a/1"
    assert [world.ran(name) for name in ("a", "b", "c", "d")] == [["1"]] * 4
    assert world.most_at_a_time() <= 2
    assert {status.state for status in world.finish(trainings, 2)} == {"finished"}
    assert summary(statuses)["ok"]


def test_a_finished_run_whose_folder_is_gone_is_not_trained_again(world: World) -> None:
    limits = Limits(max_running=1, max_attempts=1, retry_s=0)
    (status,) = reconcile([world.training("a")], world.output, limits, world.here(), lambda training: True)
    assert (status.state, world.ran("a")) == ("finished", [])


@pytest.mark.slow
def test_a_reconciler_that_is_killed_at_any_point_leads_to_one_training(world: World) -> None:
    number, killed = 0, True
    while killed:
        number += 1
        name = f"t{number}"
        training = world.training(name)
        # An attempt before it, which its reconciler claimed and never started.
        Ledger(world.output, name).claim(1, Claim(where="here", words=training.words, by=GONE, time_s=time.time()))
        killed = os.WIFSIGNALED(in_a_fork(lambda training=training: world.look([training], world.here(), 99), number))
        (status,) = world.finish([training], 99)
        assert status.state == "finished", f"killed at point {number}"
        assert len(world.ran(name)) == 1, f"killed at point {number}"
    # Before and after: begun, end, claim, the process, and its start.
    assert number > 8


@pytest.mark.slow
def test_a_training_that_is_killed_at_any_point_is_tried_again_and_never_twice_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9):
        training = world.training(f"t{number}")
        with monkeypatch.context() as patch:
            patch.setenv("MAE_TEST_KILL_AT", str(number))
            here = world.here()
            world.look([training], here, 99)
            wait_until(lambda here=here: not here.num_children, "the end of the attempt", COMMAND_DEADLINE_S)
        (status,) = world.finish([training], 99)
        assert status.state == "finished", f"killed at point {number}"
        end = Ledger(world.output, training.name).ended(1)
        assert end is not None
        assert end.status == (128 + signal.SIGKILL if number < 8 else 0), end.said
        # Pulse, begun, the outcome, the end: each before and after.
        assert world.ran(training.name) == (["2"] if number <= 4 else ["1", "2"] if number == 5 else ["1"])
        assert world.most_at_a_time() <= 2


def test_a_parent_that_looks_before_it_was_told_of_a_death_says_how_the_process_died(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "_await", lambda self, child: None)
    training, here = world.training("a"), world.here()
    with monkeypatch.context() as patch:
        patch.setenv("MAE_TEST_KILL_AT", "4")
        world.look([training], here)
    ledger = Ledger(world.output, training.name)

    def has_ended() -> bool:
        world.look([training], here, retry_s=COMMAND_DEADLINE_S)
        return ledger.ended(1) is not None

    wait_until(has_ended, "the end of the attempt", COMMAND_DEADLINE_S, poll_every_s=0.05)
    end = ledger.ended(1)
    assert end is not None
    assert (end.status, here.num_children) == (128 + signal.SIGKILL, 0), end.said


@pytest.mark.slow
def test_reconcilers_that_look_at_once_start_each_training_once_and_keep_the_limit(world: World) -> None:
    trainings = [world.training(f"t{number}") for number in range(6)]
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                world.finish(trainings, 2)
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5
    assert [status.state for status in world.look(trainings, world.here(), 2)] == ["finished"] * 6
    assert Counter(attempt for training in trainings for attempt in world.ran(training.name)) == {"1": 6}
    assert world.most_at_a_time() <= 2


@pytest.mark.slow
def test_a_failure_is_retried_with_a_wait_then_given_up_until_a_person_asks(world: World) -> None:
    training, here = world.training("a", "fail"), world.here()
    other = world.training("b")

    def attempt(retry_s: float) -> list[Status]:
        world.look([training, other], here, retry_s=0.0)
        wait_until(lambda: not here.num_children, "the end of the attempt", COMMAND_DEADLINE_S)
        return world.look([training, other], here, retry_s=retry_s)

    first, waiting = attempt(retry_s=60.0)
    assert (first.state, waiting.state) == ("retrying", "waiting"), (
        "one that waits for its next attempt holds its place"
    )
    assert first.due_s == pytest.approx(time.time() + 60, abs=30)
    assert "no luck with attempt 1; try again" in first.said
    assert attempt(retry_s=60.0)[0].due_s == pytest.approx(time.time() + 120, abs=30)
    given_up, running = attempt(retry_s=60.0)
    assert (given_up.state, running.state) == ("failed", "running")
    assert given_up.said.endswith("no luck with attempt 3; try again; after the cause is gone: --retry a")
    assert not summary([given_up])["ok"]
    (world.diary / "mended").touch()
    assert world.finish([training, other])[0].state == "failed"
    with pytest.raises(ValueError, match="there is no job 'x' to retry; the plan has a, b"):
        forgive([training, other], world.output, ["x"])
    forgive([training, other], world.output, ["a"])
    assert [status.state for status in world.finish([training, other])] == ["finished", "finished"]
    assert world.ran("a") == ["1", "2", "3", "4"]


def test_a_stop_ends_trainings_in_order_and_the_next_look_resumes_them(world: World) -> None:
    training, here = world.training("a", "hold"), world.here()
    world.look([training], here)
    wait_until(lambda: world.ran("a"), "the work to begin", COMMAND_DEADLINE_S)
    assert here.stop() == 1
    assert Ledger(world.output, "a").ended(1).status == 143  # pyright: ignore[reportOptionalMemberAccess]
    (world.diary / "go").touch()
    assert world.finish([training])[0].state == "finished"
    assert world.ran("a") == ["1", "2"]


def test_a_training_for_an_earlier_version_that_still_runs_counts(world: World) -> None:
    old, new, here = world.training("old", "hold"), world.training("new"), world.here()
    world.look([old], here)
    wait_until(lambda: world.ran("old"), "the work to begin", COMMAND_DEADLINE_S)
    assert world.look([new], here)[0].state == "waiting"
    (world.diary / "go").touch()
    wait_until(lambda: not here.num_children, "the end of the earlier version's training", COMMAND_DEADLINE_S)
    assert world.finish([new])[0].state == "finished"


def test_what_a_person_stopped_stays_stopped(world: World) -> None:
    training, ledger = world.training("a"), Ledger(world.output, "a")
    ledger.claim(1, Claim(where="ray", words=training.words, by=GONE, time_s=time.time()))
    ledger.end(1, End(status=None, said="", time_s=time.time(), kind="stopped"))
    (status,) = world.look([training], world.here())
    assert (status.state, world.ran("a")) == ("stopped", [])
    forgive([training], world.output, ["a"])
    assert world.finish([training])[0].state == "finished"
