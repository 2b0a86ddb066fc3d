"""Attempts are claimed, begun and ended at most once, and a process counts as dead only if it is."""

import dataclasses
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.handoff.ledger import DEAD_AFTER_S, Claim, End, Ledger, Process, _start_of, end_of, unended, wait_s
from pipelines.storage import Storage, open_storage

ELSEWHERE = Process(host="elsewhere pid:[1]", pid=1, started="0")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_storage(tmp_path / "runs"), "flowers-v1-0123")


def claim(by: Process | None = None, time_s: float | None = None) -> Claim:
    return Claim(where="here", words=("finetune",), by=by or Process.this(), time_s=time_s or time.time())


def dead_process() -> Process:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    found = dataclasses.replace(Process.this(), pid=child.pid, started=_start_of(child.pid))
    assert found.is_alive
    child.communicate(b"\n")
    assert not found.is_alive
    return found


def end(kind: str, time_s: float = 0.0) -> End:
    return End(status=1, said="", time_s=time_s, kind=kind)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_of_many_reconcilers_one_claims_an_attempt(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage: Storage = open_storage(
        tmp_path if kind == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}/runs"
    )
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: Ledger(storage, "a").claim(1, claim()), range(16)))
    assert won.count(True) == 1
    assert Ledger(storage, "a").last() == 1
    assert Ledger(storage, "b").last() == 0
    assert unended(storage) == ["a"]
    Ledger(storage, "a").end(1, end("failed"))
    assert unended(storage) == []
    # Listings of runs pass the ledger over.
    assert storage.list() == []


def test_an_abandoned_attempt_cannot_begin_and_one_that_began_cannot_be_abandoned(ledger: Ledger) -> None:
    first = claim()
    assert ledger.claim(1, first)
    assert ledger.claimed(1) == first
    ledger.abandon(1, "too late", 7.0)
    assert not ledger.begin(1, first.token)
    assert ledger.ended(1) == End(status=None, said="too late", time_s=7.0, kind="never began")
    second = claim()
    ledger.claim(2, second)
    assert not ledger.begin(2, first.token)
    assert ledger.begin(2, second.token)
    assert not ledger.begin(2, second.token), "a second process"
    ledger.abandon(2, "too late", 7.0)
    assert ledger.ended(2) is None
    assert ledger.settle(2, time.time()), "this process, which lives"


def test_an_attempt_of_a_dead_process_of_this_machine_ends_at_once(ledger: Ledger) -> None:
    ledger.claim(1, claim(dead_process()))
    assert not ledger.settle(1, time.time())
    assert ledger.ended(1).kind == "never began"  # pyright: ignore[reportOptionalMemberAccess]
    code = "import sys; from pipelines.handoff.ledger import *; from pipelines.storage import open_storage\n"
    code += "print(Ledger(open_storage(sys.argv[1]), sys.argv[2]).begin(2, sys.argv[3]))"
    second = claim()
    ledger.claim(2, second)
    words = [sys.executable, "-c", code, ledger.output.uri, ledger.name, second.token]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"
    assert not ledger.settle(2, time.time())
    found = ledger.ended(2)
    assert found is not None
    assert found.kind == "failed"
    assert "ended without a word" in found.said


def test_an_attempt_elsewhere_lives_as_long_as_its_pulse_is_young(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    ledger.claim(1, claim(ELSEWHERE, now_s - 30))
    assert ledger.settle(1, now_s), "it may be about to begin"
    assert not ledger.settle(1, now_s + DEAD_AFTER_S)
    second = claim(ELSEWHERE, now_s - 1000)
    ledger.claim(2, second)
    monkeypatch.setattr(Process, "this", lambda: ELSEWHERE)
    ledger.begin(2, second.token)
    assert ledger.settle(2, now_s + 30)
    assert not ledger.settle(2, now_s + DEAD_AFTER_S + 30)
    assert [found.kind for found in ledger.failures()] == ["failed"]


def test_failures_count_until_they_are_forgiven_and_stops_do_not(ledger: Ledger) -> None:
    for number, kind in enumerate(("failed", "interrupted", "never began", "failed"), 1):
        ledger.claim(number, claim())
        ledger.end(number, end(kind))
        ledger.end(number, end("succeeded"))
    assert [found.kind for found in ledger.failures()] == ["failed", "failed"]
    ledger.forgive()
    ledger.forgive()
    assert ledger.failures() == []
    ledger.claim(5, claim())
    ledger.end(5, end("stopped"))
    assert [found.kind for found in ledger.failures()] == ["stopped"]


def test_the_wait_doubles_up_to_an_hour() -> None:
    assert [wait_s([end("failed")] * count, 60) for count in (1, 2, 3, 7, 30)] == [60, 120, 240, 3600, 3600]


def test_the_end_tells_the_last_line_and_a_signals_status(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("loading\nmae: no such file; check the path\n\n")
    assert end_of(2, tmp_path / "log").said == "mae: no such file; check the path"
    found = [
        (end_of(status, tmp_path / "none").status, end_of(status, tmp_path / "none").kind) for status in (0, 2, -9)
    ]
    assert found == [(0, "succeeded"), (2, "failed"), (137, "failed")]
    assert {end_of(status, tmp_path / "none").kind for status in (143, 130, -15)} == {"interrupted"}
