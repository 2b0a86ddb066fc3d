"""Pretraining through faults that are no clean deaths: a worker that stands still, a gradient that is no number, and
faults of all kinds at twenty random moments of one run. Kills alone are in test_resume.py.
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
import yaml

from mae_core.state import tensors_digest, unpack
from pipelines.run_folder import RunFolder

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.ray,
    pytest.mark.slow,
]

REPOSITORY = Path(__file__).parents[2]
MAE = [sys.executable, "-c", "from pipelines.cli import main; main()"]
STEPS_PER_EPOCH = 9
STALL_S = 30.0


@dataclass(frozen=True)
class Place:
    """One dataset, one MLflow, one folder of runs."""

    folder: Path

    def command(self, name: str, **changes: Any) -> list[str]:
        """The command line of a run of two workers with `changes` of a config's parts."""
        config: dict[str, Any] = {
            "kind": "pretrain",
            "name": name,
            "output": str(self.folder / "runs"),
            "epochs": 10,
            "data": {"uri": str(self.folder / "data"), "batch": 32, "micro_batch": 8, "window": 64},
            "model": {
                "arch": "vit_pico_patch7",
                "image_px": [28, 28],
                "channels": 1,
                "decoder_depth": 1,
                "decoder_width": 32,
                "decoder_heads": 2,
            },
            "optim": {"base_lr": 1e-3, "warmup_epochs": 2.0},
            # On a busy machine ranks may stand apart for longer than that without a fault.
            "compute": {"num_workers": 2, "stall_s": STALL_S, "max_failures": 20},
            "checkpoint": {"every_epochs": 0.5, "keep": 2},
            "tracking": {"log_every_steps": 1, "pictures_every_epochs": 1000},
        }
        for part, values in changes.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        preset = self.folder / f"{name}.yaml"
        preset.write_text(yaml.safe_dump(config))
        return [*MAE, "pretrain", "--preset", str(preset), "--json"]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """The command, to its end."""
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900
        )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }

    def run_folder(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def newest(self, name: str) -> int:
        """Step of the newest checkpoint."""
        return max(self.run_folder(name).checkpoints.steps(), default=0)

    def weights(self, name: str) -> dict[str, str]:
        """Digest of every file of the last checkpoint."""
        checkpoint = self.run_folder(name).checkpoints.latest()
        assert checkpoint is not None
        return {file: tensors_digest(unpack(content)) for file, content in checkpoint.files.items()}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    from pipelines.sample import unpack

    with tempfile.TemporaryDirectory(prefix="mae-faults-") as scratch:
        place = Place(Path(scratch))
        images = place.folder / "images"
        images.mkdir()
        for i, path in enumerate(sorted(unpack(place.folder / "sample").rglob("*.png"))[:270]):
            shutil.copy(path, images / f"{i}.png")
        layout = ["--val-fraction", "0", "--rows-per-shard", "48", "--rows-per-group", "16"]
        prepared = place.run([*MAE, "prepare", str(images), str(place.folder / "data"), *layout])
        assert prepared.returncode == 0, prepared.stderr
        yield place


@contextlib.contextmanager
def started(command: list[str], place: Place) -> Iterator[psutil.Process]:
    """The driver runs while the block does; then it and all that it started are killed, as a machine's loss would."""
    with (place.folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=place.folder, env=place.environment, stdout=log, stderr=log, start_new_session=True
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
        process.wait()
        psutil.wait_procs(family, timeout=20)


def wait_for_step(place: Place, name: str, step: int, driver: psutil.Process, timeout_s: float = 400) -> int:
    """A checkpoint of that step or a later one is committed; returns its step."""
    deadline_s = time.monotonic() + timeout_s
    while (newest := place.newest(name)) < step:
        log = (place.folder / "log").read_text()
        assert driver.is_running(), log
        assert driver.status() != psutil.STATUS_ZOMBIE, log
        assert time.monotonic() < deadline_s, f"step {step} was not reached from {newest}: {log}"
        time.sleep(0.02)
    return newest


def workers(driver: psutil.Process) -> list[psutil.Process]:
    """The driver's own descendants that hold a rank."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_worker_that_stands_still_is_noticed_and_changes_nothing(place: Place) -> None:
    undisturbed = place.run(place.command("undisturbed"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    with started(place.command("still"), place) as driver:
        wait_for_step(place, "still", 9, driver)
        still = random.SystemRandom().choice(workers(driver))
        still.suspend()
        before = place.newest("still")
        last = wait_for_step(place, "still", 90, driver)
        assert not still.is_running(), "the worker that stood still must be gone"
        driver.wait(120)
    assert before < last == 90
    result = place.run_folder("still").result()
    assert result is not None
    assert result["goodput"]["recovery"] > 0
    assert place.weights("still") == place.weights("undisturbed")


@pytest.mark.long
def test_a_gradient_that_is_no_number_ends_the_run_at_once_with_the_sample_ids(place: Place) -> None:
    ended = place.run(place.command("nan", optim={"base_lr": 1e30}, compute={"num_workers": 1}))
    assert ended.returncode == 1
    cause = ended.stderr.strip().splitlines()[-1]
    assert cause.startswith("mae: failed: the gradient is not finite at step")
    assert cause.endswith("try a lower optim.base_lr, or --compute.on-nan skip")
    (named,) = place.run_folder("nan").storage.list("bad_steps")
    ids = json.loads(place.run_folder("nan").storage.read(named[0]))["ids"]
    assert all(str(i) in cause for i in ids)
    assert "resuming" not in ended.stderr, "starting again would not help"
    listed = place.run([*MAE, "runs", str(place.folder / "runs" / "nan"), "--json"])
    (row,) = json.loads(listed.stdout)["runs"]
    assert row["state"] == "failed"
    assert "not finite" in row["error"]


@pytest.mark.long
def test_faults_at_twenty_random_moments_change_nothing(place: Place) -> None:
    """One worker killed, all killed, one stopped, the driver killed with everything: five times each."""
    longer = {"epochs": 60, "compute": {"max_failures": 100, "stall_s": STALL_S}}
    undisturbed = place.run(place.command("long-undisturbed", **longer))
    assert undisturbed.returncode == 0, undisturbed.stderr
    command, chance, moments = place.command("long", **longer), random.SystemRandom(), []
    for _ in range(5):
        with started(command, place) as driver:
            for fault in ("one", "all", "stop", "driver"):
                step = wait_for_step(place, "long", place.newest("long") + chance.randint(5, 25), driver)
                time.sleep(chance.uniform(0, 0.2))
                moments.append((step, fault))
                ranks = workers(driver)
                if fault == "one":
                    chance.choice(ranks).kill()
                elif fault == "all":
                    for rank in ranks:
                        rank.kill()
                elif fault == "stop":
                    chance.choice(ranks).suspend()
    assert place.run_folder("long").result() is None, f"the run was over before the faults: {moments}"
    finished = place.run(command)
    assert finished.returncode == 0, finished.stderr
    assert place.weights("long") == place.weights("long-undisturbed"), moments
