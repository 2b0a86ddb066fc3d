"""Storms as long as real ones, before `mae prepare` with Ray: rows 25 to 27 of the list of what must survive.

`python -m pytest -s -m long tests/pipelines/faults/test_storms.py` prints what each cost.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.storage import open_storage

pytestmark = [pytest.mark.long, pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(1500)]
COMMAND = [sys.executable, "-c", "import sys; from pipelines import cli; cli.main(sys.argv[1:])", "prepare"]
NUM_IMAGES = 3000


@dataclass
class Job:
    """What one `mae prepare` came to."""

    said: dict[str, Any]
    seconds: float
    num_requests: int
    num_spoiled: int
    files: dict[str, str]


@pytest.fixture
def source(own_s3: Any, proxy: Any, tmp_path: Path) -> str:
    """Small images in a bucket; the proxy is calm, and slow enough that a job outlasts a storm."""
    storage = open_storage(f"{own_s3.uri}/{tmp_path.name}/source")

    def put(number: int) -> None:
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        storage.write(f"{number:05d}.png", path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(NUM_IMAGES)))
    proxy.delay_s = 0.1
    return storage.uri


def prepared(source: str, proxy: Any) -> Job:
    """`mae prepare --json` into a folder of its own, with an embedded Ray."""
    out = f"{source}-out-{time.monotonic_ns()}"
    words = [*COMMAND, source, out, "--rows-per-shard", "50", "--rows-per-group", "16", "--json"]
    started_s = time.monotonic()
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    job = Job(json.loads(done.stdout), time.monotonic() - started_s, proxy.num_requests, proxy.num_spoiled, {})
    proxy.reset(0.0, "503")
    storage = open_storage(out)
    with ThreadPoolExecutor(8) as pool:
        paths = [path for path, _ in storage.list()]
        digests = pool.map(lambda path: hashlib.sha256(storage.read(path)).hexdigest(), paths)
        job.files = dict(zip(paths, digests))
    assert not open_storage(f"{out}/.prepare").exists()
    return job


def show(what: str, calm: Job, job: Job) -> None:
    print(
        f"\n{what}: {job.seconds:.0f} s against {calm.seconds:.0f} s calm, {job.num_requests} requests against "
        f"{calm.num_requests}, {job.num_spoiled} spoiled"
    )


def test_a_minute_of_spoiled_answers_and_half_a_minute_without_a_server(source: str, proxy: Any, own_s3: Any) -> None:
    proxy.reset(0.0, "503")
    calm = prepared(source, proxy)
    assert calm.said["num_ok"] == NUM_IMAGES
    for kinds in (("503",), ("short", "reset")):
        proxy.storm(0.3, *kinds, seconds=60)
        over_s = proxy.until_s
        job = prepared(source, proxy)
        assert time.monotonic() > over_s, "the job ended before the storm: take more images"
        show(f"30 % {' or '.join(kinds)} for 60 s", calm, job)
        assert job.files == calm.files
        assert job.num_spoiled > 100
        assert job.num_requests < 2 * calm.num_requests
    job = with_server_away(source, proxy, own_s3, calm.num_requests // 2)
    show("the server killed for 30 s", calm, job)
    assert job.files == calm.files
    assert job.num_requests < 2 * calm.num_requests


def with_server_away(source: str, proxy: Any, own_s3: Any, at_request: int) -> Job:
    def restart() -> None:
        own_s3.kill()
        time.sleep(30)
        own_s3.start()

    restarting = threading.Thread(target=restart)

    def at(number: int) -> None:
        if number == at_request:
            restarting.start()

    proxy.reset(0.0, "503")
    proxy.before_request = at
    try:
        return prepared(source, proxy)
    finally:
        with contextlib.suppress(RuntimeError):  # of a job that ended before
            restarting.join()
