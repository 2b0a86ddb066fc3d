"""Where a driver of pretraining may die, the same command goes on; and what --fresh means."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mae_core.state import unpack
from pipelines.config import ComputeConfig, PretrainConfig, to_dict
from pipelines.runs.folder import RunFolder
from tests.digest import tensors_digest
from tests.pipelines.drivers.small import pretraining, working_in
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAE = str(Path(sys.executable).with_name("mae"))
MODEL = "mae-vit_pico_patch7"


@dataclass(frozen=True)
class Place:
    """A dataset, an MLflow and a folder of runs, with one run in it that nobody disturbed."""

    folder: Path
    dataset: str
    undisturbed: dict[str, Any]

    def config(self, name: str) -> PretrainConfig:
        return pretraining(self.folder, self.dataset, name)

    def run(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def weights(self, name: str) -> str:
        return tensors_digest(unpack(self.run(name).storage.read("export/mae.safetensors")))

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def versions(self, run_id: str) -> list[str]:
        """List the model versions that an MLflow run registered."""
        return [str(v.version) for v in self.client().search_model_versions(f"name = '{MODEL}'") if v.run_id == run_id]


@pytest.fixture(scope="module")
def place(few_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from pipelines.drivers.pretrain import pretrain

    folder = tmp_path_factory.mktemp("pretrain")
    with working_in(folder):
        yield Place(folder, few_prepared, pretrain(pretraining(folder, few_prepared, "calm"), "calm"))


def test_killed_after_the_last_checkpoint_only_the_export_is_left_to_do(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    run, before = place.run("calm"), place.weights("calm")
    for path, _ in run.storage.list():
        if path.startswith("export/") or path in ("result.json", "outcome.json"):
            run.storage.delete(path)
    again = pretrain(place.config("calm"), "calm")
    assert place.weights("calm") == before
    differing = {key for key in again if again[key] != place.undisturbed[key]}
    assert differing <= {"duration_s", "goodput"}
    assert place.versions(again["run_id"]) == ["1"]


def test_killed_after_publishing_nothing_is_published_twice(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    run = place.run("calm")
    outcome = run.read_outcome()
    run.storage.delete("outcome.json")
    assert pretrain(place.config("calm"), "calm") == outcome
    assert place.versions(place.undisturbed["run_id"]) == ["1"]


def test_killed_before_publishing_the_same_command_publishes_and_trains_nothing(place: Place) -> None:
    preset = place.folder / "killed.yaml"
    preset.write_text(yaml.safe_dump({"kind": "pretrain"} | to_dict(place.config("killed"))))
    command = [MAE, "pretrain", "--preset", str(preset), "--json"]
    kill_once_trained(command, place)
    assert place.run("killed").read_outcome() is None, "the kill came too late to mean anything"

    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=JOB_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert place.weights("killed") == place.weights("calm")
    assert len(place.versions(outcome["run_id"])) == 1
    assert place.client().get_run(outcome["run_id"]).info.status == "FINISHED"
    named = [run for run in all_runs(place) if run.info.run_name == "killed"]
    assert [run.info.run_id for run in named] == [outcome["run_id"]]


def test_a_bit_flipped_in_the_newest_checkpoint_costs_two_workers_its_steps_and_no_failure(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.drivers.pretrain import pretrain

    config = dataclasses.replace(place.config("flipped"), compute=ComputeConfig(num_workers=2, max_failures=0))
    pretrain(config, "flipped")
    run, before = place.run("flipped"), place.weights("flipped")
    first, newest = run.checkpoints.steps()
    for path, _ in run.storage.list():
        if path.startswith("export/") or path in ("result.json", "outcome.json"):
            run.storage.delete(path)
    (path,) = [path for path, _ in run.storage.list(f"checkpoints/step-{newest:010d}") if "/model-" in path]
    content = run.storage.read(path)
    run.storage.write(path, content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level(logging.INFO):
        again = pretrain(config, "flipped")
    assert f"step {newest} in {run.storage.uri} is damaged; restarting the workers" in caplog.text
    assert place.weights("flipped") == before
    assert run.checkpoints.steps() == [first, newest]
    run.checkpoints.verify(newest)
    assert again["failures"] == 0
    assert not run.read_failures()


def test_fresh_starts_anew_in_a_run_of_its_own(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    again = pretrain(place.config("calm"), "calm", fresh=True)
    assert again["run_id"] != place.undisturbed["run_id"]
    assert again["model"] != place.undisturbed["model"]
    assert again["loss"] == place.undisturbed["loss"]


def kill_once_trained(command: list[str], place: Place) -> None:
    """Kill the driver and everything it started once the workers have written their result."""
    result = place.folder / "runs" / "killed" / "result.json"
    with (place.folder / "killed.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=place.folder, stdout=log, stderr=log, start_new_session=True)
    driver = psutil.Process(process.pid)
    family = [driver]
    try:
        wait_until(
            result.exists,
            lambda: f"the workers' result: {(place.folder / 'killed.log').read_text()}",
            JOB_DEADLINE_S,
            alive=lambda: process.poll() is None,
        )
        family += driver.children(recursive=True)
    finally:
        for member in (*driver.children(recursive=True), *family):
            try:
                os.kill(member.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(KILLED_DEADLINE_S)
    psutil.wait_procs(family, timeout=KILLED_DEADLINE_S)


def all_runs(place: Place) -> list[Any]:
    client = place.client()
    return client.search_runs([e.experiment_id for e in client.search_experiments()])
