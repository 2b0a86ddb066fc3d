"""What takes long is said on the console; the timeline has every stage, and costs nothing where none is asked for."""

import json
import logging
import os
from pathlib import Path

import psutil
import pytest

from pipelines.bench.config import StartBenchConfig
from pipelines.bench.starting import run, stages_of
from pipelines.stages import TIMELINE, note, saying, stage
from tests.waiting import wait_until


def test_a_wait_is_said_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    is_over = False
    with saying("compiling", lambda: is_over, every_s=0.01):
        wait_until(lambda: len(caplog.messages) >= 2, "two lines")
        is_over = True
    assert set(caplog.messages) == {"compiling, 0 s so far"}


def test_a_short_stage_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with stage("starting Ray"):
        pass
    assert not caplog.messages


def test_stages_of_all_processes_are_in_the_timeline_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note("before there is a timeline")
    path = tmp_path / "timeline.jsonl"
    monkeypatch.setenv(TIMELINE, str(path))
    note("reading the command")
    with pytest.raises(KeyError), stage("failing"):
        raise KeyError
    with stage("importing"):
        pass
    before_s = psutil.Process().create_time() - 10
    note("starting the workers", before_s, before_s + 1)
    assert {json.loads(line)["pid"] for line in path.read_text().splitlines()} == {os.getpid()}
    found = stages_of(path.read_text())
    assert [one.what for one in found] == ["starting the workers", "reading the command", "importing"]
    assert found[0].started_s == 0
    assert found[0].ended_s == pytest.approx(1)
    assert found[1].started_s == pytest.approx(10)


@pytest.mark.ray
@pytest.mark.long
def test_a_start_is_measured_from_the_command_to_the_first_step() -> None:
    found = run(StartBenchConfig(rounds=1))
    names = list(found["stages"])
    assert names[0] == "reading the command"
    assert names[-1] == "first step, with its images"
    assert {"starting Ray", "starting the workers", "warming up"} < set(names)
    last = found["stages"][names[-1]]
    assert found["first_step_s"] == pytest.approx(last["started_s"] + last["took_s"])
    assert "first step after" in found["text"]
