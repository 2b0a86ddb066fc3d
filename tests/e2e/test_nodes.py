"""Nodes go and come while a run of one or two workers goes on: a warning, a loss without one, a new node, a dead GCS.

Several raylets on this machine (ray.cluster_utils); the driver is a process of its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import ModelConfig, OptimConfig
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig, TrackingConfig
from pipelines.jobs import PretrainJob, job_to_dict
from pipelines.manifest import read_manifest
from pipelines.pretrain import pixels_of
from pipelines.report import read_points
from pipelines.run_folder import RunFolder
from pipelines.storage import open_storage

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    # Ray's own, of the raylets that it starts and we remove.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

REPOSITORY = Path(__file__).parents[2]
EPOCHS, STEPS_PER_EPOCH = 40, 9
TOTAL = EPOCHS * STEPS_PER_EPOCH
DRIVER = """
import json, sys
from pipelines.cluster import ray_session
from pipelines.jobs import job_from_dict
from pipelines.launch import launch
job = job_from_dict(json.loads(sys.argv[1]))
with ray_session(job.config.compute):
    launch([job], "nodes")
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A prepared dataset of 270 images."""
    from pipelines.sample import unpack

    with tempfile.TemporaryDirectory(prefix="mae-nodes-") as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for i, path in enumerate(sorted(unpack(folder / "sample").rglob("*.png"))[:270]):
            shutil.copy(path, folder / "images" / f"{i}.png")
        prepare = [sys.executable, "-c", "from pipelines.cli import main; main()", "prepare"]
        layout = ["--val-fraction", "0", "--rows-per-shard", "48", "--rows-per-group", "16"]
        words = [*prepare, str(folder / "images"), str(folder / "data"), *layout]
        subprocess.run(words, check=True, cwd=folder, env=environment(), capture_output=True, timeout=400)
        yield folder


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A head without CPUs, and so many nodes with two; the environment of all of them is this process'."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment().items():
            patch.setenv(key, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=2)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


def job_of(folder: Path, name: str) -> PretrainJob:
    data = str(folder / "data")
    config = PretrainConfig(
        name=name,
        output=str(folder / "runs"),
        epochs=EPOCHS,
        data=DataConfig(uri=data, batch=32, micro_batch=8, window=64),
        model=ModelConfig(
            arch="vit_pico_patch7", image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=32, decoder_heads=2
        ),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=2.0),
        compute=ComputeConfig(num_workers=2, min_workers=1, spread=True, max_failures=10, stall_s=60),
        checkpoint=CheckpointConfig(every_epochs=1, keep=2),
        tracking=TrackingConfig(log_every_steps=1, pictures_every_epochs=1000),
    )
    manifest = read_manifest(open_storage(data))
    return PretrainJob(folder=str(folder / "runs" / name), config=config, pixels=pixels_of(manifest, 1))


@contextlib.contextmanager
def driving(folder: Path, job: PretrainJob, address: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(job_to_dict(job))],
            env=environment() | {"RAY_ADDRESS": address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def wait_for_step(run: RunFolder, step: int, driver: subprocess.Popen[bytes], log: Path) -> int:
    deadline_s = time.monotonic() + 300
    while (newest := max(run.checkpoints.steps(), default=0)) < step:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, f"step {step} was not reached from {newest}: {log.read_text()}"
        time.sleep(0.05)
    return newest


def losses(run: RunFolder) -> dict[int, float]:
    """The loss of every step, the last where it was taken twice."""
    points = [
        point
        for path, _ in run.storage.list("metrics", suffix=".jsonl")
        for point in read_points(run.storage.read(path), path)
    ]
    return {point.step: point.value for point in points if point.key == "train/loss"}


def drain(address: str, node: Any, in_s: float) -> None:
    """The node will be taken away in so many seconds, and Ray is told so."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    accepted, reason = GcsClient(address=address).drain_node(
        node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "", int(1000 * (time.time() + in_s))
    )
    assert accepted, reason


def test_a_run_goes_on_with_the_nodes_that_there_are(folder: Path) -> None:
    job, run, log = job_of(folder, "moving"), RunFolder(str(folder / "runs" / "moving")), folder / "log"
    with cluster_of(2) as cluster, driving(folder, job, cluster.address) as driver:
        wait_for_step(run, 18, driver, log)
        warned, lost = list(cluster.worker_nodes)
        drain(cluster.address, warned, in_s=15)
        time.sleep(15)
        cluster.remove_node(warned)
        alone = wait_for_step(run, max(run.checkpoints.steps()) + 18, driver, log)
        cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        step = wait_for_step(run, alone + 18, driver, log)
        cluster.remove_node(lost, allow_graceful=False)
        wait_for_step(run, step + 18, driver, log)
        assert driver.wait(600) == 0, log.read_text()
    assert run.result() is not None
    assert "a node is about to be taken away" in log.read_text()
    assert sorted(losses(run)) == list(range(1, TOTAL + 1))


def test_after_the_death_of_the_gcs_the_same_command_goes_on(folder: Path) -> None:
    job, run, log = job_of(folder, "headless"), RunFolder(str(folder / "runs" / "headless")), folder / "log"
    with cluster_of(2) as cluster, driving(folder, job, cluster.address) as driver:
        before = wait_for_step(run, 18, driver, log)
        cluster.head_node.kill_gcs_server()
        time.sleep(5)
    with cluster_of(2) as cluster, driving(folder, job, cluster.address) as driver:
        assert driver.wait(600) == 0, log.read_text()
    assert run.result() is not None
    assert before < TOTAL
    assert sorted(losses(run)) == list(range(1, TOTAL + 1))
