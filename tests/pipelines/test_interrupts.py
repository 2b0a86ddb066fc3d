"""Real processes get real signals: the first ends the command in order, the second at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import COMMAND_DEADLINE_S, let_pass, wait_until

COMMAND = """
import sys, threading, time
from pathlib import Path
from pipelines import cli
from pipelines.cli.commands import COMMANDS, Command
from pipelines.interrupts import deferring_signals, stopping_at, wait_for

def run(call):
    {body}

COMMANDS["doctor"] = Command(help="Waits.", config=None, run=run, resumes=True)
cli.main(["doctor", "--json"])
"""
SLEEPS = """
    with stopping_at(lambda: "stopped at step 3 of 9"):
        Path("begun").touch()
        time.sleep(600)
"""
WAITS_FOR_A_GROUP = """
    asked = threading.Event()
    def work():
        Path("begun").touch()
        asked.wait()
        time.sleep({work_s})
        Path("ended").touch()
    def stop():
        asked.set()
        Path("asked").touch()
        return {grace_s}
    wait_for(work, stop)
"""
IN_A_DESTRUCTOR = """
    class Slow:
        def __del__(self):
            Path("begun").touch()
            time.sleep(60)
    with stopping_at(lambda: "stopped at step 3 of 9"):
        Slow()
        time.sleep(600)
"""
FAILS = """
    def interrupted():
        Path("begun").touch()
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            raise RuntimeError("release unlocked lock")
    if {says}:
        with stopping_at(lambda: "stopped at step 3 of 9"):
            interrupted()
    interrupted()
"""
CLEANS_UP = """
    with deferring_signals():
        Path("begun").touch()
        while not Path("signalled").exists():
            time.sleep(0.01)
        Path("ended").touch()
    time.sleep(600)
"""
ENDS = """
    import atexit
    def late():
        Path("begun").touch()
        time.sleep(600)
    atexit.register(late)
    return {}
"""
IMPORTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pipelines.cli":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
sys.argv = ["mae", "prepare", "my images", "out"]
from pipelines.__main__ import main
main()
"""


def started(folder: Path, body: str, *prefix: str) -> "subprocess.Popen[str]":
    """Start the command; return it once it is at work."""
    code = COMMAND.format(body=body.strip())
    words = [*prefix, sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((folder / "begun").exists, "its work", COMMAND_DEADLINE_S, alive=lambda: process.poll() is None)
    return process


def ended(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Return exit status and lines on stderr."""
    out, err = process.communicate(timeout=COMMAND_DEADLINE_S)
    assert out == ""
    return process.returncode, err.splitlines()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_how_far_it_got_and_the_command_that_resumes(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = started(tmp_path, SLEEPS)
    process.send_signal(number)
    said = [
        f"mae: {number.name}: stopping in order; a second one ends at once",
        "mae: stopped at step 3 of 9; to resume: mae doctor --json",
    ]
    assert ended(process) == (status, said)


def test_a_signal_while_the_command_is_imported_ends_it_with_the_command_to_repeat() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [
        "mae: SIGTERM: stopping in order; a second one ends at once",
        "mae: stopped before it began; to start it again: mae prepare 'my images' out",
    ]
    assert (done.returncode, done.stdout) == (143, "")


def test_a_signal_in_a_destructor_where_python_ignores_errors_is_not_lost(tmp_path: Path) -> None:
    process = started(tmp_path, IN_A_DESTRUCTOR)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert (status, said[1:]) == (143, ["mae: stopped at step 3 of 9; to resume: mae doctor --json"])


@pytest.mark.parametrize("says", [True, False])
def test_an_error_that_a_signal_causes_is_taken_for_the_signal(says: bool, tmp_path: Path) -> None:
    process = started(tmp_path, FAILS.format(says=says))
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    stopped = "stopped at step 3 of 9" if says else "stopped"
    assert (status, said[1:]) == (143, [f"mae: {stopped}; to resume: mae doctor --json"])


def test_a_signal_waits_for_the_end_of_what_defers_it(tmp_path: Path) -> None:
    process = started(tmp_path, CLEANS_UP)
    process.send_signal(signal.SIGTERM)
    let_pass(0.1)
    (tmp_path / "signalled").touch()
    status, said = ended(process)
    assert (status, said[1:]) == (143, ["mae: stopped; to resume: mae doctor --json"])
    assert (tmp_path / "ended").exists()


def test_a_signal_after_the_commands_end_ends_it_at_once_with_its_own_status(tmp_path: Path) -> None:
    process = started(tmp_path, ENDS)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=COMMAND_DEADLINE_S)
    assert (process.returncode, out, err) == (0, "{}\n", "")


def test_work_that_stops_within_its_grace_is_waited_for(tmp_path: Path) -> None:
    process = started(tmp_path, WAITS_FOR_A_GROUP.format(work_s=0.3, grace_s=600))
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert (status, said[1:]) == (143, ["mae: stopped; to resume: mae doctor --json"])
    assert (tmp_path / "ended").exists()


def test_work_that_does_not_stop_within_its_grace_is_left_and_that_is_said(tmp_path: Path) -> None:
    process = started(tmp_path, WAITS_FOR_A_GROUP.format(work_s=600, grace_s=0.2))
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    wanted = "mae: the workers did not stop within 0.2 s; to resume: mae doctor --json"
    assert (status, said[1:]) == (143, [wanted])


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = started(tmp_path, WAITS_FOR_A_GROUP.format(work_s=600, grace_s=600))
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "asked").exists, "the request to stop")
    let_pass(0.6)
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 130
    assert len(said) == 1


def test_timeout_which_sends_its_signal_twice_ends_a_command_in_order(tmp_path: Path) -> None:
    process = started(tmp_path, SLEEPS, "timeout", "--preserve-status", "600")
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert (status, len(said)) == (143, 2)


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """A shell's script starts commands in the background with SIGINT ignored."""
    process = started(tmp_path, SLEEPS, "sh", "-c", 'trap "" INT; exec "$@"', "sh")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert (status, said[0]) == (143, "mae: SIGTERM: stopping in order; a second one ends at once")


def test_sigterm_can_be_made_to_end_a_process_whose_main_thread_runs_no_python() -> None:
    code = """
import os, signal, threading
from pipelines.interrupts import die_of_sigterm
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
thread = threading.Thread(target=die_of_sigterm)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")
