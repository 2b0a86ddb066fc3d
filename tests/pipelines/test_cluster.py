"""An embedded Ray that does not start at once, and what it leaves behind."""

import os
import subprocess
import sys
from typing import Any

import pytest

from pipelines.cluster import ray_session
from pipelines.config import ComputeConfig
from pipelines.errors import CommandFailed
from tests.waiting import COMMAND_DEADLINE_S


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
    """Else what the same process asks of a cluster later would go to the address where nothing listens."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    before = dict(os.environ)
    with ray_session(ComputeConfig()):
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"
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
