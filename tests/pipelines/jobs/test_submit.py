"""What needs no cluster: which words are ours, which address is meant, and which exit status comes of a record."""

import pytest

from mae_core.errors import UserError
from pipelines.cli import parse
from pipelines.config import JobsConfig, SubmitConfig
from pipelines.jobs import JobRecord, job_server_address, open_job_server
from pipelines.jobs.submit import _result, _table, submit


@pytest.mark.parametrize(
    ("words", "command", "config"),
    [
        ("mae pretrain --preset nano --json", "mae pretrain --preset nano --json", SubmitConfig()),
        ("-- mae pretrain --detach", "mae pretrain --detach", SubmitConfig()),
        ("--detach --address http://h:1 -- ls -- -l", "ls -- -l", SubmitConfig(detach=True, address="http://h:1")),
        ("--env A=1 B=2 --working-dir= -- env", "env", SubmitConfig(env=("A=1", "B=2"), working_dir="")),
    ],
)
def test_words_of_the_command_are_its_own(words: str, command: str, config: SubmitConfig) -> None:
    call = parse(["submit", *words.split(" ")])
    assert (call.arguments, call.config) == (tuple(command.split()), config)


def test_a_command_is_needed_and_options_before_it_need_dashes() -> None:
    for words in ([], ["--"], ["--detach"]):
        with pytest.raises(UserError, match="missing COMMAND, the words of the command"):
            parse(["submit", *words])
    with pytest.raises(UserError, match="unexpected 'l'; usage: mae submit COMMAND"):
        parse(["submit", "--detach", "ls", "l"])


def test_the_address_given_is_used_before_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert job_server_address() == ""
    with pytest.raises(UserError, match="no cluster is known; give --address http://HOST:8265"):
        open_job_server()
    monkeypatch.setenv("RAY_ADDRESS", "http://b")
    assert job_server_address() == "http://b"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a")
    assert (job_server_address(), job_server_address("http://c")) == ("http://a", "http://c")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="env 'A' is not NAME=VALUE"):
        SubmitConfig(env=("A",))
    with pytest.raises(UserError, match="follow and stop are both given"):
        JobsConfig(follow="a", stop="b")
    with pytest.raises(UserError, match="working_dir /nowhere is no folder"):
        submit(["ls"], SubmitConfig(working_dir="/nowhere"))


def record(status: str, exit_status: int | None) -> JobRecord:
    about = {"id": "j", "command": "c" * 99, "message": "why", "start_s": 1e9, "end_s": None, "metadata": {}}
    return JobRecord(status=status, exit_status=exit_status, **about)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("status", "exit_status", "ours"),
    [
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        ("FAILED", 3, 3),
        ("FAILED", None, 1),
        ("STOPPED", 0, 1),
        ("FAILED", -9, 137),
    ],
)
def test_the_status_is_the_commands(status: str, exit_status: int | None, ours: int) -> None:
    assert _result(record(status, exit_status))["exit_status"] == ours


def test_jobs_are_listed_one_a_line() -> None:
    assert _table([]) == "no jobs"
    (line,) = _table([record("RUNNING", None)]).splitlines()
    assert line.startswith("j  RUNNING    2001-09-")
    assert line.endswith("c" * 80 + "...")
