"""Servers of a small cluster on loopback: Postgres, an S3 store, MLflow and Ray nodes, each killed and started again.

Each keeps its data in a folder of its own and gets its secrets from the caller. Tests read this folder where it lies.
"""

import http.client
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import END_LIMIT_S, START_LIMIT_S, kill, marked_processes, until

from pipelines.bench.object_store import server_command
from pipelines.bench.ports import StorePorts, free_port, free_store_ports

BIN = Path(sys.executable).parent
HEAD_IP, WORKER_IP = "127.0.0.2", "127.0.0.3"
"""Ray replaces 127.0.0.1 by the machine's outer address, but no other address of the loopback network."""
_RAY_STARTS = 10
_REQUEST_S = 10.0
_PASSED_ON = ("RAY_", "MLFLOW_", "AWS_", "PG")
_MARK = "MAE_CLUSTER_SERVICE"


class Service:
    """A server process with all that it starts. Subclasses say how to start it and when it responds."""

    name = ""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.with_suffix(".log")
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """Return the command that runs the server in the foreground."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Return what the server's environment has besides the caller's."""
        return {}

    def user(self) -> str | None:
        """Return the user who runs the server; None for the caller."""
        return None

    def responds(self) -> object:
        """Return something true if the server responds; may raise OSError otherwise."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the server without waiting for it."""
        environment = without_others(os.environ) | dict(self.environment()) | {_MARK: self._mark}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=self.user(),
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server responds. Raises RuntimeError with the end of its log if it ends before."""
        process = self._process
        assert process is not None
        until(self.responds, f"{self.name}; see {self.log}", alive=lambda: process.poll() is None, log=self.log)

    def kill(self) -> None:
        """End the server and everything it started with SIGKILL, as the loss of its machine would."""
        until(lambda: not kill(self.pids()), f"the end of {self.name}", END_LIMIT_S)
        if self._process is not None:
            self._process.wait(END_LIMIT_S)
            self._process = None

    def stop(self) -> None:
        """End the server in order; kill it if it takes longer than some seconds."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self.kill()

    def pids(self) -> list[int]:
        """Ids of the server's processes."""
        return marked_processes(f"{_MARK}={self._mark}")


class Postgres(Service):
    """A Postgres with one database for MLflow, whose superuser has a password."""

    name = "Postgres"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port, self._password = free_port(), secrets.token_hex(16)
        self._data = folder / "data"

    @property
    def uri(self) -> str:
        """URI of the database, with its password: never an argument of a command, which others can read.

        It names the driver, since SQLAlchemy 2.1 takes another one, psycopg, by default.
        """
        return f"postgresql+psycopg2://mlflow:{self._password}@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        """Make an empty database. Raises FileNotFoundError if Postgres is not installed."""
        password_file = self.folder / "password"
        password_file.write_text(self._password)
        password_file.chmod(0o600)
        if (user := self.user()) is not None:
            for path in (self.folder, password_file):
                shutil.chown(path, user)
        command = [postgres_program("initdb"), "-D", str(self._data), "-U", "mlflow", "--pwfile", str(password_file)]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        with self.log.open("ab") as log:
            subprocess.run(
                command, check=True, cwd=self.folder, stdout=log, stderr=log, user=user, timeout=START_LIMIT_S
            )

    def command(self) -> Sequence[str]:
        """Return the command of a server on loopback; what it wrote survives its processes, not the machine."""
        words = [postgres_program("postgres"), "-D", str(self._data), "-p", str(self.port), "-h", "127.0.0.1"]
        return [*words, "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=200"]

    def user(self) -> str | None:
        """Postgres refuses to run as root."""
        if os.getuid() != 0:
            return None
        with suppress(KeyError):
            return pwd.getpwnam("postgres").pw_name
        return "nobody"

    def responds(self) -> object:
        """Return whether a client can connect."""
        import psycopg2

        try:
            psycopg2.connect(self.uri.replace("+psycopg2", ""), connect_timeout=3).close()
        except psycopg2.OperationalError as error:
            raise ConnectionError(str(error)) from None
        return True


class Store(Service):
    """SeaweedFS as S3 store, with buckets and one key."""

    name = "the S3 store"

    def __init__(self, folder: Path, buckets: Sequence[str]) -> None:
        super().__init__(folder)
        self.ports: StorePorts = free_store_ports()
        self._buckets = buckets
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self.client_environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        }

    def client(self) -> Any:
        """Return a client of boto3."""
        import boto3

        values = self.client_environment
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=values["AWS_DEFAULT_REGION"],
            aws_access_key_id=values["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=values["AWS_SECRET_ACCESS_KEY"],
        )

    def command(self) -> Sequence[str]:
        """Return the command of a server on loopback."""
        return server_command(self.folder, ",".join(self._buckets), self.ports)

    def environment(self) -> Mapping[str, str]:
        """Return the key that the server accepts."""
        return self.client_environment

    def responds(self) -> object:
        """Return whether all buckets are there."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = {bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]}
        except (BotoCoreError, ClientError) as error:
            raise ConnectionError(str(error)) from None
        return set(self._buckets) <= found

    def names(self, bucket: str, prefix: str) -> list[str]:
        """List the objects below a prefix."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


class Mlflow(Service):
    """An MLflow server with a database, and artifacts in a folder or bucket."""

    name = "MLflow"

    def __init__(
        self, folder: Path, database_uri: str, artifacts: str, environment: Mapping[str, str], num_workers: int = 1
    ) -> None:
        super().__init__(folder)
        self.port, self._num_workers = free_port(), num_workers
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **environment,
            "MLFLOW_BACKEND_STORE_URI": database_uri,
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Its job runners would be processes of hundreds of MB for features that nobody uses here.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def command(self) -> Sequence[str]:
        """Return the command of a server on loopback."""
        words = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port)]
        return [*words, "--workers", str(self._num_workers)]

    def environment(self) -> Mapping[str, str]:
        """Return the variables that name database and artifacts."""
        return self._environment

    def responds(self) -> object:
        """Return whether the server is healthy."""
        return status(f"{self.url}/health") == 200


@dataclass(frozen=True)
class RayPlace:
    """Ports of a Ray cluster on this machine, and the environment of its nodes, jobs and users."""

    environment: dict[str, str] = field(repr=False)
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    client: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        """Address of the dashboard and job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    def get(self, path: str) -> Any:
        """Ask the dashboard with the token; return its JSON."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers), timeout=_REQUEST_S
        ) as got:
            return json.load(got)

    def alive(self) -> set[str]:
        """Addresses of the nodes that are alive."""
        rows = self.get("/nodes?view=summary")["data"]["summary"]
        return {row["ip"] for row in rows if row.get("raylet", {}).get("state") == "ALIVE"}


class RayNode(Service):
    """A head or a worker node: `ray start --block` with an address of its own on the loopback network."""

    def __init__(self, folder: Path, place: RayPlace, ip: str, num_cpus: int = 2) -> None:
        super().__init__(folder)
        self._place, self._ip, self._num_cpus, self._number = place, ip, num_cpus, 0
        self.name = "Ray's head" if ip == HEAD_IP else "Ray's worker node"

    def command(self) -> Sequence[str]:
        """Return the command of the node; each start has a temporary folder of its own."""
        place, self._number = self._place, self._number + 1
        words = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address", self._ip]
        words += ["--num-cpus", str(self._num_cpus), "--object-store-memory", str(2**27)]
        words += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", str(free_port())]
        # The path of a socket below it may have 107 characters only.
        words += ["--temp-dir", str(self.folder / str(self._number))]
        if self._ip != HEAD_IP:
            return [*words, "--address", f"{HEAD_IP}:{place.gcs}"]
        words += ["--head", "--port", str(place.gcs), "--ray-client-server-port", str(place.client)]
        return [*words, "--dashboard-host", "127.0.0.1", "--dashboard-port", str(place.dashboard)]

    def environment(self) -> Mapping[str, str]:
        """Return the environment of the cluster."""
        return self._place.environment

    def wait(self) -> None:
        """Wait until the node is alive; start it again if Ray gives up, as it does after 30 s on a busy machine."""
        for _ in range(_RAY_STARTS - 1):
            try:
                return super().wait()
            except RuntimeError:
                self.kill()
                self.start()
        return super().wait()

    def responds(self) -> object:
        """Return whether the cluster counts the node as alive."""
        return self._ip in self._place.alive()


def postgres_program(name: str) -> str:
    """Return the path of one of Postgres' programs. Raises FileNotFoundError if it is not installed."""
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = shutil.which(name) or (str(newest[-1]) if newest else None)
    if found is None:
        raise FileNotFoundError(f"{name} is absent; install Postgres: apt-get install postgresql")
    return found


def without_others(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the caller's Ray, MLflow, S3 and Postgres."""
    return {key: value for key, value in environment.items() if not key.startswith(_PASSED_ON)}


def status(url: str) -> int:
    """Return the status of a server's response. Raises OSError if it does not respond in HTTP."""
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_S) as answer:
            return answer.status
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url} does not speak HTTP: {error!r}") from None
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
