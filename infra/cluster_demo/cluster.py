"""The demo's cluster: all servers in one folder, the environment of its users, and the commands that they run."""

import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services import (
    BIN,
    HEAD_IP,
    WORKER_IP,
    Mlflow,
    Postgres,
    RayNode,
    RayPlace,
    Service,
    Store,
    without_others,
)

JOBS = Path(__file__).parent / "jobs"
"""Working directory of everything that is submitted: presets and the hand-over's file."""
_JOB_LIMIT_S = 1800.0


@dataclass(frozen=True)
class Outcome:
    """What a command said, and its exit status."""

    status: int
    text: str


class Reconciler(Service):
    """`mae handoff --watch`, the service that trains what a champion lacks."""

    name = "the reconciler"

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__(folder)
        self._environment = environment

    def command(self) -> Sequence[str]:
        """Return the command that looks every five seconds."""
        return [*MAE, "handoff", "--jobs", str(JOBS / "handoff.yaml"), "--watch", "--every-s", "5"]

    def environment(self) -> Mapping[str, str]:
        """Return the environment of a user of the cluster."""
        return self._environment

    def responds(self) -> object:
        """Return whether it runs: it answers nobody."""
        return True


MAE = [sys.executable, "-m", "pipelines"]


class Cluster:
    """Postgres, S3 store, MLflow, a Ray head and a worker node with made secrets, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = Postgres(folder / "postgres")
        self.store = Store(folder / "s3", ["mae", "mlflow"])
        self.mlflow = Mlflow(folder / "mlflow", self.postgres.uri, "s3://mlflow/server", self.store.client_environment)
        (folder / "home").mkdir()
        self.environment = {
            **self.store.client_environment,
            "HOME": str(folder / "home"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "MLFLOW_TRACKING_URI": self.mlflow.url,
            "MAE_ARTIFACTS": "s3://mlflow/direct",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Workers are the main workload here; Ray would run them at niceness 15.
            "RAY_worker_niceness": "0",
            # Each job would start as many idle workers as a node has CPUs, which import what its work does not need.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.ray = RayPlace(self.environment)
        self.environment["RAY_API_SERVER_ADDRESS"] = self.ray.url
        self.head, self.worker = (RayNode(folder / ip[-1], self.ray, ip) for ip in (HEAD_IP, WORKER_IP))
        self.reconciler = Reconciler(folder / "handoff", self.environment)
        self._log = folder / "commands.log"

    def start(self) -> None:
        """Start everything but the reconciler, and wait until it responds."""
        self.postgres.create()
        for server in (self.postgres, self.store, self.mlflow, self.head, self.worker):
            server.start()
            server.wait()

    def stop(self) -> None:
        """End every process; also what was started while the cluster was being stopped."""
        for server in (self.reconciler, self.worker, self.head, self.mlflow, self.store, self.postgres):
            server.kill()

    def mae(self, *words: str) -> Outcome:
        """Run a command of `mae` that needs no node of the cluster."""
        with self.running(words) as process:
            return self.outcome(process)

    def submitted(self, *words: str) -> tuple[str, ...]:
        """Return the words that run a command on the cluster, from a copy of the folder with presets."""
        return ("submit", "--working-dir", str(JOBS), "--", "mae", *words)

    @contextmanager
    def running(self, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """Run `mae` with these words while the block runs."""
        with self._log.open("a") as log:
            log.write(f"$ mae {shlex.join(words)}\n")
        process = subprocess.Popen(
            [*MAE, *words],
            env=without_others(os.environ) | self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def outcome(self, process: "subprocess.Popen[str]") -> Outcome:
        """Wait until the command ends."""
        text, _ = process.communicate(timeout=_JOB_LIMIT_S)
        with self._log.open("a") as log:
            log.write(text)
        return Outcome(process.returncode, text)


def is_rank_alive(node: Service) -> bool:
    """Return whether a process of the node is a worker of Ray Train."""
    for process_id in node.pids():
        try:
            if b"RayTrainWorker" in Path(f"/proc/{process_id}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False
