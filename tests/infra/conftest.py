"""infra is no package: its scripts are read where they lie. A Ray cluster and an MLflow server are started for real."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest

from pipelines.bench.ports import free_port
from tests.services import infra_module, processes
from tests.waiting import COMMAND_DEADLINE_S, JOB_DEADLINE_S, KILLED_DEADLINE_S, REQUEST_DEADLINE_S, wait_until

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# Ray replaces 127.0.0.1 by the machine's outer address, but no other address of the loopback network.
HEAD_IP, WORKER_IP = "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def infra() -> ModuleType:
    """infra/validate.py as a module; infra.kustomization is its neighbour."""
    return infra_module("validate.py")


@pytest.fixture(scope="session")
def servers() -> SimpleNamespace:
    """Return the functions that start servers and check whether they respond."""

    def program(name: str) -> str:
        found = shutil.which(name, path=str(BIN)) or shutil.which(name)
        if found is None:
            pytest.fail(f"{name} is absent; `make setup` installs it")
        return found

    return SimpleNamespace(process=_process, status=_status, program=program)


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def until(self, probe: Callable[[], T | None], what: str = "a response") -> T:
        """Wait until the server responds as wanted; return that. Raises with the end of its log, at once if it dies."""
        return wait_until(
            probe,
            lambda: f"{what} of {self.name}, whose log ends with: {self.log.read_text(errors='replace')[-2000:]}",
            COMMAND_DEADLINE_S,
            alive=lambda: self.process.poll() is None,
            errors=(OSError, KeyError),
            poll_every_s=0.2,
        )


@dataclass(frozen=True)
class LocalCluster:
    """A head and a worker node, each with its own loopback address, and an MLflow server beside them."""

    dashboard: str
    tracking_uri: str
    environment: dict[str, str] = field(repr=False)
    node_ids: dict[str, str]
    """Node id of each address."""

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit -- words`; return its outcome with its output."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--", *words]
        return subprocess.run(
            command,
            env=self.environment,
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=JOB_DEADLINE_S,
        )

    def workers(self) -> dict[str, str]:
        """Node id of every Ray Train worker that has run so far, by the worker's actor id."""
        answer = _get(f"{self.dashboard}/api/v0/actors?detail=1&limit=1000", self.environment["RAY_AUTH_TOKEN"])
        rows = answer["data"]["result"]["result"]
        return {row["actor_id"]: row["node_id"] for row in rows if row["class_name"].startswith("RayTrainWorker")}

    def finished_runs(self) -> list[Any]:
        """MLflow's runs that have finished, of all experiments."""
        return [run for run in self._runs() if run["info"]["status"] == "FINISHED"]

    def statuses(self) -> dict[str, str]:
        """Status of each of MLflow's runs by name."""
        return {run["info"]["run_name"]: run["info"]["status"] for run in self._runs()}

    def _runs(self) -> list[Any]:
        found = self._mlflow("experiments/search", {"max_results": 100})["experiments"]
        query = {"experiment_ids": [row["experiment_id"] for row in found]}
        return self._mlflow("runs/search", query).get("runs", [])

    def _mlflow(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self.tracking_uri}/api/2.0/mlflow/{path}"
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=REQUEST_DEADLINE_S
        ) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes as two `ray start --block`, and MLflow; every process that was started is gone afterwards."""
    root = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        gcs, dashboard, head_agent, worker_agent, client, mlflow = (free_port() for _ in range(6))
        tracking_uri = f"http://127.0.0.1:{mlflow}"
        environment = _environment(tracking_uri, root)
        url, token = f"http://127.0.0.1:{dashboard}", environment["RAY_AUTH_TOKEN"]
        mlflow_server = stack.enter_context(_mlflow(mlflow, root))
        head = ["--head", "--port", str(gcs), "--node-ip-address", HEAD_IP, "--ray-client-server-port", str(client)]
        head += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        ray_head = stack.enter_context(_node(head, head_agent, environment, root / "head.log"))
        ray_head.until(lambda: _get(f"{url}/api/version", token))
        worker = ["--address", f"{HEAD_IP}:{gcs}", "--node-ip-address", WORKER_IP]
        ray_worker = stack.enter_context(_node(worker, worker_agent, environment, root / "worker.log"))
        nodes = ray_worker.until(lambda: _two_nodes(url, token), "the registration")
        mlflow_server.until(lambda: _status(f"{tracking_uri}/health") == 200)
        yield LocalCluster(url, tracking_uri, environment, nodes)


def _environment(tracking_uri: str, root: Path) -> dict[str, str]:
    """Return the environment of both nodes and every job: a home folder of its own, and nothing of the caller's Ray."""
    return _inherited() | {
        "HOME": str(root),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(24),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "MLFLOW_TRACKING_URI": tracking_uri,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def _inherited() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "AWS_"))}


@contextmanager
def _node(arguments: list[str], agent_port: int, environment: dict[str, str], log: Path) -> Iterator[Server]:
    """`ray start --block` runs, with a temporary folder of its own."""
    command = [str(BIN / "ray"), "start", *arguments, "--block", "--disable-usage-stats", "--num-cpus", "4"]
    command += ["--object-store-memory", str(2**27), "--min-worker-port", "0", "--max-worker-port", "0"]
    # Not under pytest's folder: the path of a socket in it may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="mae-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command += ["--temp-dir", folder, "--dashboard-agent-listen-port", str(agent_port)]
        with _process(command, environment, log) as server:
            yield server


@contextmanager
def _mlflow(port: int, root: Path) -> Iterator[Server]:
    """Run an MLflow server on loopback, since a remote cluster cannot reach a sqlite file."""
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "artifacts"),
    ]
    with _process(command, {}, root / "mlflow.log") as server:
        yield server


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Server]:
    """Run a server; afterwards kill it and everything it started."""
    mark = f"MAE_TEST_PROCESS={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")
    with log.open("wb") as output:
        child = subprocess.Popen(command, env=_inherited() | environment | {name: value}, stdout=output, stderr=output)
    try:
        yield Server(" ".join([Path(command[0]).name, command[1]]), log, child)
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=2)
        processes().end_all(mark)
        child.wait(KILLED_DEADLINE_S)


def _two_nodes(url: str, token: str) -> dict[str, str] | None:
    rows = _get(f"{url}/nodes?view=summary", token)["data"]["summary"]
    alive = {row["ip"]: row["raylet"]["nodeId"] for row in rows if row.get("raylet", {}).get("state") == "ALIVE"}
    return alive if set(alive) == {HEAD_IP, WORKER_IP} else None


def _get(url: str, token: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=REQUEST_DEADLINE_S) as answer:
        return json.load(answer)


def _status(url: str, **headers: str) -> int:
    """Return the HTTP status of a server's response. Raises OSError if it does not respond."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=REQUEST_DEADLINE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
