"""Every second of a run counts once, over all its attempts."""

import pytest

from pipelines.worker import goodput
from pipelines.worker.goodput import KINDS, Attempt, Clock
from tests.waiting import let_pass

NONE = dict.fromkeys(KINDS, 0.0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clocks by one that the test sets in the returned list."""
    moment = [1000.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: moment[0])
    monkeypatch.setattr(goodput.time, "time", lambda: moment[0])
    return moment


def test_a_block_within_a_block_is_not_counted_twice(now: list[float]) -> None:
    clock = Clock()
    now[0] += 1
    with clock.spent("steps"):
        now[0] += 6
        with clock.spent("data"):
            now[0] += 2
        with clock.spent("checkpoint"):
            now[0] += 1
    assert clock.saved()["seconds"] == NONE | {"steps": 6, "data": 2, "checkpoint": 1, "other": 1}
    assert clock.shares() == NONE | {"steps": 0.6, "data": 0.2, "checkpoint": 0.1, "other": 0.1}


def test_the_start_of_a_first_attempt_is_no_recovery(now: list[float]) -> None:
    clock = Clock.started(Attempt(launched_s=990), None)
    assert clock.saved()["seconds"]["other"] == 10


def test_what_is_done_again_and_the_start_of_the_group_are_recovery(now: list[float]) -> None:
    saved = {"seconds": {"steps": 50.0}, "time_s": 960.0}
    clock = Clock.started(Attempt(launched_s=900), saved)
    now[0] += 5
    with clock.spent("steps"):
        now[0] += 1
    now[0] += 1
    assert clock.saved()["seconds"] == NONE | {"steps": 51, "recovery": 45, "other": 1}


def test_the_time_when_no_driver_ran_is_not_counted(now: list[float]) -> None:
    saved = {"seconds": {"steps": 50.0}, "time_s": 100.0}
    clock = Clock.started(Attempt(launched_s=990, died_s=107), saved)
    assert clock.saved()["seconds"]["recovery"] == 17


def test_seconds_are_of_the_wall() -> None:
    clock = Clock()
    with clock.spent("steps"):
        let_pass(0.01)
    assert clock.saved()["seconds"]["steps"] >= 0.01
