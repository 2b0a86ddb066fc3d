"""What a folder says of a run, whether its driver lives, was killed or failed."""

import json
import threading
import time
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.config import RunsConfig
from pipelines.runs import listing as module
from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.folder import RunFolder
from pipelines.runs.listing import Heartbeat, RunStatus, last_alive_s, list_runs, runs, table
from pipelines.runs.metrics import MetricSpool
from pipelines.storage import Storage
from tests.waiting import EVENT_DEADLINE_S, join, wait_until


def make(folder: Path, name: str, steps: range = range(1, 6)) -> RunFolder:
    """Create a run of four epochs of five steps, with metrics and checkpoints of `steps`."""
    run = RunFolder(str(folder / name))
    run.claim({"kind": "pretrain", "config": {"epochs": 4}})
    spool = MetricSpool(run.storage)
    for step in steps:
        spool.add(step, {"train/loss": 1 / step, "epoch": step / 5})
        run.checkpoints.save(Checkpoint(step=step, files={}, meta={}), Retention(newest=1))
    spool.close()
    return run


def state_of(folder: Path, name: str) -> str:
    (row,) = (row for row in list_runs(str(folder)) if row.run == name)
    return row.state


def test_every_run_is_listed_with_its_step_checkpoint_and_loss(tmp_path: Path) -> None:
    make(tmp_path, "b/nested")
    make(tmp_path, "a", range(0))
    a, nested = list_runs(str(tmp_path))
    assert (a.run, a.state, a.step, a.checkpoint, a.loss) == ("a", "stopped", None, None, None)
    wanted = RunStatus(
        run="b/nested",
        kind="pretrain",
        state="stopped",
        step=5,
        total_steps=20,
        checkpoint=5,
        loss=0.2,
        quiet_s=None,
        error="",
    )
    assert nested == wanted
    (alone,) = list_runs(str(tmp_path / "b" / "nested"))
    assert (alone.run, alone.step) == ("", 5)
    assert "stopped, step 5 of 20, checkpoint 5, loss 0.2000" in table([nested])


def test_the_state_is_what_the_driver_last_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, "a")
    assert last_alive_s(run.storage) is None
    with Heartbeat([run.storage]):
        assert state_of(tmp_path, "a") == "running"
    alive_s = last_alive_s(run.storage)
    assert alive_s is not None
    assert abs(alive_s - time.time()) < 60
    monkeypatch.setattr(module, "_DEAD_AFTER_S", -1.0)
    assert state_of(tmp_path, "a") == "stopped"
    run.mark_trained({"loss": 0.1})
    assert state_of(tmp_path, "a") == "trained"
    with pytest.raises(RuntimeError), Heartbeat([run.storage]):
        raise RuntimeError("no\nroom")
    assert state_of(tmp_path, "a") == "failed"
    assert list_runs(str(tmp_path))[0].error == "no room"
    run.mark_published({"loss": 0.1})
    assert state_of(tmp_path, "a") == "finished"


def test_the_heartbeat_is_renewed_while_the_driver_lives_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEAT_EVERY_S", 0.01)
    run = make(tmp_path, "a")
    assert last_alive_s(run.storage) is None
    beats, renewed = [], threading.Event()
    write = Storage.write

    def noted(self: Storage, path: str, content: bytes) -> None:
        write(self, path, content)
        beats.append(json.loads(content)["time_s"])
        if len(beats) == 3:
            renewed.set()

    monkeypatch.setattr(Storage, "write", noted)
    with Heartbeat([run.storage]):
        assert renewed.wait(EVENT_DEADLINE_S)
    assert last_alive_s(run.storage) == beats[-1]
    assert beats == sorted(set(beats))
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_watching_ends_with_the_run_and_shows_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_POLL_EVERY_S", 0.01)
    run = make(tmp_path, "a", range(1, 2))
    started = threading.Event()

    def drive() -> None:
        with Heartbeat([run.storage]):
            started.set()
            wait_until(lambda: caplog.messages, "the first line of the watch")
            make(tmp_path, "a", range(2, 4))
            run.mark_published({})

    driver = threading.Thread(target=drive)
    driver.start()
    assert started.wait(EVENT_DEADLINE_S)
    with caplog.at_level("INFO"):
        caught = runs(str(tmp_path), RunsConfig(watch=True))["runs"]
    join(driver)
    assert [(row["state"], row["step"]) for row in caught] == [("finished", 3)]
    assert caplog.messages[0].startswith("running, step 1 of 20")
    assert caplog.messages[-1].startswith("finished, step 3 of 20")


def test_only_one_run_can_be_watched(tmp_path: Path) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b")
    with pytest.raises(ValueError, match=r"holds 2 runs; --watch follows one: try .*/a"):
        runs(str(tmp_path), RunsConfig(watch=True))


def test_a_place_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run found in .*; try"):
        list_runs(str(tmp_path))


def test_the_command_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "a")
    with pytest.raises(SystemExit) as stop:
        main(["runs", str(tmp_path), "--json"])
    assert stop.value.code == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["a"]
