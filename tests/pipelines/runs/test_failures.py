"""What is said of a worker group that ended before its time."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines.runs.failures import cause_of, failure_recorder, is_preemption
from pipelines.runs.folder import RunFolder


class Dead(Exception):
    """As Ray Train reports a worker that does not answer any more."""

    def __init__(self, said: str, preempted: bool = False) -> None:
        super().__init__(said)
        self.health_check_failure = Gone(preempted)


class Gone(Exception):
    def __init__(self, preempted: bool) -> None:
        super().__init__("gone")
        self.preempted = preempted


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the logging of this process instead of that of a Ray process."""
    monkeypatch.setattr("pipelines.runs.failures.log_to_driver", lambda: None)


COLLATERAL = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer")


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({0: COLLATERAL, 1: Dead("Worker exit type: SYSTEM_ERROR")}, "the process of rank 1 died without an error"),
        ({0: COLLATERAL, 1: Dead("The actor died because its node has died.")}, "the node of rank 1 died"),
        ({0: COLLATERAL, 2: ValueError("a\nb")}, "rank 2 failed: b"),
        (
            {0: COLLATERAL, 1: COLLATERAL},
            "rank 0 lost another rank, whose process or node died or hangs ([third_party/gloo",
        ),
        (
            {0: ValueError("x"), 1: RuntimeError("CUDA out of memory.")},
            "rank 1 ran out of memory (CUDA out of memory.)",
        ),
        ({3: RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe #0")}, "rank 3 ran out of memory (Def"),
        ({0: Dead("Task was killed due to the node running low on memory")}, "Ray killed rank 0"),
        ({0: KeyError()}, "rank 0 failed: KeyError"),
    ],
)
def test_the_cause_is_what_the_most_telling_rank_died_of(failures: Mapping[int, Exception], said: str) -> None:
    assert cause_of(failures).startswith(said)


def test_an_announced_end_is_no_failure_and_every_other_is_kept_by_the_unfinished_run(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("done", "goes on", "waits")]
    RunFolder(folders[0]).mark_trained({})
    recorder = failure_recorder(folders, 3)
    announced = {0: COLLATERAL, 1: Dead("its node has died", preempted=True)}
    assert is_preemption(announced)
    recorder.after_exception(None, announced)
    for cause in ("first", "second"):
        recorder.after_exception(None, {1: ValueError(cause)})
    assert [RunFolder(folder).read_failures() for folder in folders] == [
        [],
        ["rank 1 failed: first", "rank 1 failed: second"],
        [],
    ]


def test_a_failure_that_the_storage_refuses_to_keep_is_logged_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(self: RunFolder, cause: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(RunFolder, "add_failure", refuses)
    recorder = failure_recorder([str(tmp_path)], 3)
    for _ in range(2):
        recorder.after_exception(None, {0: ValueError("x")})
    assert caplog.messages[-2] == "failure 2 (3 allowed): rank 0 failed: x"
    assert "No space left on device" in caplog.messages[-1]
    assert RunFolder(str(tmp_path)).read_failures() == []
