"""Runs of the smallest model that has all parts, whose drivers are started, watched and killed by a test."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import yaml

from mae_core.state import unpack
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest
from pipelines.runs.folder import RunFolder
from pipelines.runs.metrics import read_points
from tests.digest import tensors_digest
from tests.new_mlflow import new_mlflow
from tests.waiting import KILLED_DEADLINE_S, RUN_DEADLINE_S, wait_until

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
MAE = [sys.executable, "-c", "from pipelines.cli import main; main()"]
STEPS_PER_EPOCH = 9
"""Of 270 images: eight whole batches of 32 and a short one, in four micro-batches each, windows below the whole."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the runs of a module live: one dataset, one MLflow, one log, one folder of runs."""

    folder: Path
    dataset: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, dataset: Path, **environment: str) -> "Place":
        """Make a place whose commands import this code and have a Ray and an MLflow of their own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        ours = {
            "MLFLOW_TRACKING_URI": new_mlflow(folder),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        return cls(folder=folder, dataset=dataset, environment=kept | ours | environment)

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return the config of a run of two workers, with `changes` of the config's sections."""
        config: dict[str, Any] = {
            "name": name,
            "output": str(self.folder / "runs"),
            "epochs": 10,
            "data": {"uri": str(self.dataset), "batch": 32, "micro_batch": 8, "window": 32},
            "model": {
                "arch": "vit_pico_patch7",
                "image_px": [28, 28],
                "channels": 1,
                "decoder_depth": 1,
                "decoder_width": 32,
                "decoder_heads": 2,
            },
            "optim": {"base_lr": 1e-3, "warmup_epochs": 2.0},
            "compute": {"num_workers": 2, "max_failures": 20},
            "checkpoint": {"every_epochs": 0.5, "keep": 2},
            "tracking": {"log_every_steps": 1, "pictures_every_epochs": 1000},
        }
        for part, values in changes.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        return config

    def command(self, name: str, **changes: Any) -> list[str]:
        """Return the command line of the config."""
        preset = self.folder / f"{name}.yaml"
        preset.write_text(yaml.safe_dump({"kind": "pretrain"} | self.config(name, **changes)))
        return [*MAE, "pretrain", "--preset", str(preset), "--json"]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=RUN_DEADLINE_S,
        )

    @property
    def log(self) -> str:
        """What the drivers that were started here have said."""
        return (self.folder / "log").read_text()

    def run_folder(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def newest(self, name: str) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        return max(self.run_folder(name).checkpoints.steps(), default=0)

    def weights(self, name: str) -> dict[str, str]:
        """Digest of every file of the last checkpoint, and its step."""
        checkpoint = self.run_folder(name).checkpoints.latest()
        assert checkpoint is not None
        digests = {file: tensors_digest(unpack(content)) for file, content in checkpoint.files.items()}
        return digests | {"step": str(checkpoint.step)}

    def losses(self, name: str) -> dict[int, float]:
        """Return the loss of every step; of a repeated step, the last one."""
        storage = self.run_folder(name).storage
        points = [
            point
            for path, _ in storage.list("metrics", suffix=".jsonl")
            for point in read_points(storage.read(path), path)
        ]
        return {point.step: point.value for point in points if point.key == "train/loss"}


def prepare_here(source: Path, out: Path, options: PrepareConfig) -> Manifest:
    """Prepare in this process, without Ray."""
    from pipelines.prepare import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.cluster.ray_session", lambda compute: contextlib.nullcontext())
        patch.setattr("pipelines.prepare.passes._run_tasks", map)
        return prepare(str(source), str(out), options)


@contextlib.contextmanager
def started(command: list[str], place: Place) -> Iterator[psutil.Process]:
    """Run the driver while the block runs; then kill it with everything it started, as the loss of a machine would."""
    with (place.folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=place.folder, env=dict(place.environment), stdout=log, stderr=log, start_new_session=True
        )
    driver = psutil.Process(process.pid)
    try:
        yield driver
    finally:
        family = [driver]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += driver.children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(KILLED_DEADLINE_S)
        assert not psutil.wait_procs(family, timeout=KILLED_DEADLINE_S)[1]


def wait_for_step(place: Place, name: str, step: int, driver: psutil.Process) -> int:
    """Wait until a checkpoint of that step or a later one is committed; return its step."""
    wait_for(lambda: place.newest(name) >= step, f"step {step}", place, driver)
    return place.newest(name)


def wait_for(condition: Callable[[], T | None], what: str, place: Place, driver: psutil.Process) -> T:
    """Wait until the driver has brought about the condition; return its value."""
    alive = partial(runs, driver)
    return wait_until(condition, lambda: f"{what}: {place.log}", RUN_DEADLINE_S, alive=alive, poll_every_s=0.02)


def runs(driver: psutil.Process) -> bool:
    """Return whether the driver is still running."""
    try:
        return driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def exit_status(driver: psutil.Process) -> int | None:
    """Wait until the driver ends; return its exit status."""
    return driver.wait(RUN_DEADLINE_S)


def stop(place: Place, driver: psutil.Process, number: signal.Signals) -> str:
    """Stop a command in order, by SIGTERM to it or by Ctrl-C in its terminal; return what it said since.

    Check its exit status, that it said nothing of our libraries' insides, and that it left no process.
    """
    begin, family = len(place.log), driver.children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)
    else:
        driver.send_signal(number)
    status = exit_status(driver)
    said = place.log[begin:]
    assert status == 128 + number, said
    for noise in ("Traceback", "Exception ignored in", "received at time", "Fatal Python error"):
        assert noise not in said, said
    assert not psutil.wait_procs(family, timeout=KILLED_DEADLINE_S)[1]
    return said


def ranks(of: psutil.Process) -> list[psutil.Process]:
    """List the descendants of a driver, or of a node's raylet, that hold a rank."""
    return _descendants(of, "RayTrainWorker")


def coordinators(of: psutil.Process) -> list[psutil.Process]:
    """List the descendants of a driver, or of a node's raylet, that hand out the blocks of a feed."""
    return _descendants(of, "SplitCoordinator")


def _descendants(of: psutil.Process, actor: str) -> list[psutil.Process]:
    found = []
    for process in of.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if actor in " ".join(process.cmdline()):
                found.append(process)
    return found
