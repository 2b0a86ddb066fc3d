"""An embedded Ray that does not start at once, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig
from pipelines.errors import CommandFailed
from tests.waiting import COMMAND_DEADLINE_S, KILLED_DEADLINE_S, wait_until


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace ray.init by one that fails twice as Ray does on a busy machine; return the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("os.environ", dict(os.environ))
    return calls


def test_an_embedded_ray_that_did_not_start_is_started_again_with_the_same_arguments(
    starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(ComputeConfig()):
        assert len(starts) == 3
    assert starts[0] == starts[1] == starts[2]
    assert starts[0]["address"] == "local"


def test_the_environment_of_a_session_ends_with_it(
    starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the same process does on a cluster later would be without the watcher of preemptions."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "1")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    before = dict(os.environ)
    with ray_session(ComputeConfig()):
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
        assert os.environ["RAY_DATA_LOG_LEVEL"] == "1"
    assert dict(os.environ) == before


SESSION = """
import logging, psutil
from pipelines.cluster import ray_session

root = logging.getLogger()
logging.basicConfig(level=logging.INFO)
before = root.level, list(root.handlers)
with ray_session(None):
    import ray
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    assert (root.level, root.handlers) == before
    family = psutil.Process().children(recursive=True)
    assert {"raylet", "gcs_server"} <= {process.name() for process in family}
assert (root.level, root.handlers) == before
left = psutil.wait_procs(family, timeout=1)[1]
assert not left, left
"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_embedded_ray_leaves_neither_a_process_nor_another_root_logger() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=environment, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout


FAILED_START = """
import sys
import warnings

warnings.simplefilter("error")
sys.unraisablehook = lambda found: print(found.exc_value)
import ray._private.node
from pipelines.cluster import ray_session

failed = []

def start_processes(node, start=ray._private.node.Node.start_ray_processes):
    start(node)
    if not failed:
        failed.append(node.node_ip_address)
        raise Exception("The current node timed out during startup.")

ray._private.node.Node.start_ray_processes = start_processes
warnings.simplefilter("ignore", DeprecationWarning)
with ray_session(None):
    print("started after", len(failed))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_start_that_failed_leaves_no_warning_of_its_processes() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [sys.executable, "-c", FAILED_START]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started after 1\n"


def is_alive(pid: int) -> bool:
    """Return whether a process has not ended; nobody may have asked yet how it did."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


START = """
import json, sys, threading
from pathlib import Path
import psutil, ray._private.node, ray._private.worker
from pipelines import cli
from pipelines.cli.commands import COMMANDS, Command
from pipelines.cluster import ray_session

def reached():
    family = [process.pid for process in psutil.Process().children(recursive=True)]
    Path("family").write_text(json.dumps(family))
    Path("reached").touch()
    threading.Event().wait()

def run(call):
    with ray_session(None):
        return {}

def start_processes(node, start=ray._private.node.Node.start_ray_processes):
    start(node)
    reached()

if sys.argv[1] == "processes":
    ray._private.node.Node.start_ray_processes = start_processes
else:
    ray._private.worker._post_init_hooks.append(reached)
COMMANDS["doctor"] = Command(help="Starts Ray.", config=None, run=run, resumes=True)
cli.main(["doctor"])
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "moment"), [(signal.SIGTERM, "connected"), (signal.SIGINT, "processes")])
def test_a_signal_while_ray_starts_ends_the_command_in_order(
    number: signal.Signals, moment: str, tmp_path: Path
) -> None:
    """Both when Ray has started its processes and when it is connected to them, where its own handler aborted."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [sys.executable, "-c", START, moment]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    reached = tmp_path / "reached"
    try:
        wait_until(reached.exists, "the moment", COMMAND_DEADLINE_S, alive=lambda: process.poll() is None)
        process.send_signal(number)
        _, said = process.communicate(timeout=COMMAND_DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    # A busy machine takes long enough for a line such as "starting Ray, 20 s so far".
    assert [line for line in said.splitlines() if not line.startswith("starting Ray")] == [
        f"mae: {number.name}: stopping in order; a second one ends at once",
        "mae: stopped; to resume: mae doctor",
    ]
    family = json.loads((tmp_path / "family").read_text())
    assert len(family) > 3
    wait_until(lambda: not any(map(is_alive, family)), "the end of Ray's processes", KILLED_DEADLINE_S)


def test_a_cluster_that_does_not_answer_is_asked_once_and_named(
    starts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(CommandFailed, match=r"Ray 127.0.0.1:1 did not answer .*timed out"),
        ray_session(ComputeConfig()),
    ):
        pytest.fail("no session was opened")
    assert len(starts) == 1
