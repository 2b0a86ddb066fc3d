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
from tests.waiting import COMMAND_DEADLINE_S, RUN_DEADLINE_S, join, let_pass

pytestmark = [pytest.mark.long, pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(1500)]
COMMAND = [sys.executable, "-c", "import sys; from pipelines import cli; cli.main(sys.argv[1:])", "prepare"]
NUM_IMAGES = 1500
# Of every answer, so that a job outlasts a storm on a machine of any speed.
DELAY_S = 1.0
STORM_AT = 200


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
    """Small images in a bucket; the proxy is calm."""
    storage = open_storage(f"{own_s3.uri}/{tmp_path.name}/source")

    def put(number: int) -> None:
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        storage.write(f"{number:05d}.png", path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(NUM_IMAGES)))
    return storage.uri


def prepared(source: str, proxy: Any) -> Job:
    """`mae prepare --json` into a folder of its own, with an embedded Ray."""
    out = f"{source}-out-{time.monotonic_ns()}"
    words = [*COMMAND, source, out, "--rows-per-shard", "50", "--rows-per-group", "16", "--json"]
    started_s, proxy.delay_s = time.monotonic(), DELAY_S
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=RUN_DEADLINE_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    job = Job(json.loads(done.stdout), time.monotonic() - started_s, proxy.num_requests, proxy.num_spoiled, {})
    proxy.reset(0.0, "503")
    proxy.delay_s = 0.0
    storage = open_storage(out)
    assert not list(storage.walk(".prepare"))
    with ThreadPoolExecutor(8) as pool:
        paths = [path for path, _ in storage.list()]
        digests = pool.map(lambda path: hashlib.sha256(storage.read(path)).hexdigest(), paths)
        job.files = dict(zip(paths, digests))
    return job


def test_a_minute_of_spoiled_answers_and_half_a_minute_without_a_server(source: str, proxy: Any, own_s3: Any) -> None:
    proxy.reset(0.0, "503")
    calm = prepared(source, proxy)
    assert calm.said["num_ok"] == NUM_IMAGES
    stormy = {
        "30 % answer 503 for 60 s": lambda: in_a_storm(source, proxy, "503"),
        "the server is killed for 30 s": lambda: with_server_away(source, proxy, own_s3, calm.num_requests // 2),
        "30 % short or reset for 60 s": lambda: in_a_storm(source, proxy, "short", "reset"),
    }
    print(f"\ncalm: {calm.seconds:.0f} s, {calm.num_requests} requests")
    for what, run in stormy.items():
        job = run()
        print(f"{what}: {job.seconds:.0f} s, {job.num_requests} requests, {job.num_spoiled} spoiled", flush=True)
        assert job.files == calm.files
        assert job.num_requests < 2 * calm.num_requests


def in_a_storm(source: str, proxy: Any, *kinds: str) -> Job:
    """Run the job in a storm that starts once it has begun to read, since a job takes long to start."""
    over_s: list[float] = []

    def at(number: int) -> None:
        if number == STORM_AT:
            proxy.share, proxy.until_s = 0.3, time.monotonic() + 60
            over_s.append(proxy.until_s)

    proxy.reset(0.0, *kinds)
    proxy.before_request = at
    job = prepared(source, proxy)
    assert time.monotonic() > over_s[0], "the job ended before the storm: take more images"
    assert job.num_spoiled > 50
    return job


def with_server_away(source: str, proxy: Any, own_s3: Any, at_request: int) -> Job:
    def restart() -> None:
        own_s3.kill()
        let_pass(30)
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
            join(restarting, COMMAND_DEADLINE_S)
