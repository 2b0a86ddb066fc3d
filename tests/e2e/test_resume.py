"""A pretraining run that was killed again and again equals one that nobody disturbed, bit for bit.

Two workers are tried by `make test-long`, three by `make test`: DDP's buckets matter from three on.

One run of each size is killed three times, since each start of a worker group costs seconds: one worker, then all
workers (the driver starts both again), then the driver with everything it started (the same command goes on).
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mae_core.config import ModelConfig, OptimConfig
from mae_core.state import tensors_digest, unpack
from pipelines.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    PrepareConfig,
    PretrainConfig,
    TrackingConfig,
    to_dict,
)
from pipelines.run_folder import RunFolder

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

MAE = str(Path(sys.executable).parent / "mae")
EPOCHS, STEPS_PER_EPOCH = 14, 9
TOTAL = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Place:
    """Where all runs of this module live: one dataset, one MLflow, one folder of runs."""

    folder: Path
    dataset: str

    def config(self, num_workers: int, name: str) -> PretrainConfig:
        return _config(self.folder, self.dataset, num_workers, name)

    def run_folder(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))


def _config(folder: Path, dataset: str, num_workers: int, name: str) -> PretrainConfig:
    """Global batches of four micro-batches (3 workers need placeholders), a short last batch, a window below N."""
    return PretrainConfig(
        name=name,
        output=str(folder / "runs"),
        epochs=EPOCHS,
        data=DataConfig(uri=dataset, batch=32, micro_batch=8, window=64),
        model=ModelConfig(
            arch="vit_pico_patch7", image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=32, decoder_heads=2
        ),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=2.0),
        compute=ComputeConfig(num_workers=num_workers),
        checkpoint=CheckpointConfig(every_epochs=0.5, keep=2),
        tracking=TrackingConfig(log_every_steps=1, pictures_every_epochs=1000),
    )


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A prepared dataset of 270 images."""
    from pipelines.cluster import ray_session
    from pipelines.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="mae-resume-") as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "600")
        patch.chdir(folder)
        _copy_images(folder / "images")
        dataset = str(folder / "data")
        with ray_session(ComputeConfig()):
            prepare(
                str(folder / "images"), dataset, PrepareConfig(val_fraction=0.0, rows_per_shard=48, rows_per_group=16)
            )
        yield Place(folder, dataset)


def _copy_images(folder: Path) -> None:
    """270 images of the sample: eight whole batches and a short one."""
    from pipelines.sample import unpack

    source = unpack(folder.with_name("sample"))
    for name in ("bag", "dress", "sneaker"):
        (folder / "train" / name).mkdir(parents=True)
        for path in sorted((source / "train" / name).iterdir())[:90]:
            shutil.copy(path, folder / "train" / name / path.name)


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_run_that_was_killed_equals_one_that_was_not(place: Place, num_workers: int) -> None:
    name, wanted = f"killed-{num_workers}", f"undisturbed-{num_workers}"
    _outcome(place, num_workers, wanted)
    command, chance = _command(place, num_workers, name), random.SystemRandom()
    steps = []
    with _started(command, place.folder) as driver:
        steps.append(_wait_for_step(place, name, chance.randint(1, 25), driver))
        time.sleep(chance.uniform(0, 0.2))
        chance.choice(_train_workers(driver)).kill()
        steps.append(_wait_for_step(place, name, _newest(place, name) + chance.randint(5, 25), driver))
        for worker in _train_workers(driver):
            worker.kill()
        steps.append(_wait_for_step(place, name, _newest(place, name) + chance.randint(5, 25), driver))
        time.sleep(chance.uniform(0, 0.2))
    assert place.run_folder(name).result() is None, f"killed after {steps}: the run was over before"

    finished = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=480)
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stderr
    assert _weights(place, name) == _weights(place, wanted), f"killed after {steps}"
    _check_mlflow(place, name, wanted)


def test_the_same_command_again_prints_the_finished_result_and_trains_nothing(place: Place) -> None:
    name = "undisturbed-3"
    first = _outcome(place, 3, name)
    before = place.run_folder(name).storage.list()
    assert _outcome(place, 3, name) == first
    assert place.run_folder(name).storage.list() == before


@pytest.mark.long
def test_two_workers_and_three_see_the_same_batches(place: Place) -> None:
    losses = []
    for num_workers in (2, 3):
        _outcome(place, num_workers, f"undisturbed-{num_workers}")
        losses.append(dict(_points(place, f"undisturbed-{num_workers}", "train/loss")))
    assert losses[0].keys() == losses[1].keys()
    assert [losses[1][step] for step in losses[1]] == pytest.approx([losses[0][step] for step in losses[1]], rel=1e-3)


def _outcome(place: Place, num_workers: int, name: str) -> dict[str, Any]:
    """What the finished run found; it is run first where it is not finished."""
    command = _command(place, num_workers, name)
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _command(place: Place, num_workers: int, name: str) -> list[str]:
    """The command line that means the config."""
    import yaml

    preset = place.folder / f"{name}.yaml"
    preset.write_text(yaml.safe_dump({"kind": "pretrain"} | to_dict(place.config(num_workers, name))))
    return [MAE, "pretrain", "--preset", str(preset), "--json"]


@contextlib.contextmanager
def _started(command: list[str], folder: Path) -> Iterator[psutil.Process]:
    """The driver runs while the block does; then it is killed with all its descendants, as a lost machine would be."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    driver = psutil.Process(process.pid)
    try:
        yield driver
    finally:
        family = [*driver.children(recursive=True), driver]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        assert not psutil.wait_procs(family, timeout=20)[1]


def _train_workers(driver: psutil.Process) -> list[psutil.Process]:
    """The driver's own descendants that hold a rank."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    assert found, "no worker runs"
    return found


def _newest(place: Place, name: str) -> int:
    """Step of the newest checkpoint."""
    return max(place.run_folder(name).checkpoints.steps(), default=0)


def _wait_for_step(place: Place, name: str, step: int, driver: psutil.Process) -> int:
    """A checkpoint of that step or a later one is committed; returns its step."""
    deadline_s = time.monotonic() + 240
    while (newest := _newest(place, name)) < step:
        log = (place.folder / "log").read_text()
        assert driver.is_running(), log
        assert driver.status() != psutil.STATUS_ZOMBIE, log
        assert time.monotonic() < deadline_s, f"step {step} was not reached: {log}"
        time.sleep(0.02)
    return newest


def _weights(place: Place, name: str) -> dict[str, str]:
    """Digest of every file of training state after the last step, and of what was exported."""
    folder = place.run_folder(name)
    checkpoint = folder.checkpoints.latest()
    assert checkpoint is not None
    assert checkpoint.step == TOTAL
    digests = {file: tensors_digest(unpack(content)) for file, content in checkpoint.files.items()}
    return digests | {"export": tensors_digest(unpack(folder.storage.read("export/mae.safetensors")))}


def _points(place: Place, name: str, key: str) -> list[tuple[int, float]]:
    """Every (step, value) of a metric, as MLflow has it."""
    client, run = _mlflow_run(place, name)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def _mlflow_run(place: Place, name: str) -> tuple[Any, Any]:
    """The only run of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mae")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def _check_mlflow(place: Place, name: str, wanted: str) -> None:
    """One run, finished, with each step of each metric once and the undisturbed values; one model version."""
    client, run = _mlflow_run(place, name)
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "lr", "epoch"):
        points = sorted(_points(place, name, key))
        assert [step for step, _ in points] == list(range(1, TOTAL + 1))
        assert points == sorted(_points(place, wanted, key))
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert len(versions) == 1
