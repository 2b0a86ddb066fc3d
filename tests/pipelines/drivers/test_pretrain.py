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
from pipelines.config import ComputeConfig, PretrainConfig, TrackingConfig, to_dict
from pipelines.monitoring.metrics import dataset_families, exporter_families, registry_families, run_families
from pipelines.registry import RegistryCounts
from pipelines.runs.folder import RunFolder
from tests.digest import tensors_digest
from tests.pipelines.drivers.small import pretraining, working_in
from tests.pipelines.monitoring.scraping import Seen, scraped
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, RUN_DEADLINE_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAE = str(Path(sys.executable).with_name("mae"))
MODEL = "mae-vit_pico_patch7"


@dataclass(frozen=True)
class Place:
    """A dataset, an MLflow and a folder of runs, with one run in it that nobody disturbed."""

    folder: Path
    dataset: str
    undisturbed: dict[str, Any]
    seen: Seen
    """What Prometheus saw of that run."""

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
        config = pretraining(folder, few_prepared, "calm", tracking=TrackingConfig(tensorboard=str(folder / "tb")))
        with scraped(output=str(folder / "runs"), datasets=few_prepared) as seen:
            outcome = pretrain(config, "calm")
        yield Place(folder, few_prepared, outcome, seen)


def test_prometheus_sees_the_run_while_it_trains_and_its_version(place: Place) -> None:
    empty = RegistryCounts(num_versions={}, aliases={}, moves=[], gates={})
    families = [*run_families({}), *dataset_families([]), *registry_families(empty), *exporter_families({})]
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    seen = place.seen
    assert exported - seen.keys() == {
        "mae_run_mfu_ratio",  # of GPUs
        "mae_run_gpu_memory_ratio",
        "mae_registry_alias_moves_total",  # of promotions
        "mae_registry_alias_moved_timestamp_seconds",
    }
    assert {"pretrain calm running", "pretrain calm finished"} <= seen["mae_run_state"].keys()
    assert seen["mae_run_images_per_second"]["calm"] > 0
    assert seen["mae_run_loss"]["calm"] == pytest.approx(place.undisturbed["loss"])
    shares = seen["mae_run_goodput_ratio"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert 0 < shares["calm steps"] < 1
    assert 0 <= shares["calm data"] < 1
    steps = place.undisturbed["steps"]
    assert seen["mae_run_step"] == seen["mae_run_checkpoint_step"] == seen["mae_run_total_steps"] == {"calm": steps}
    ended_s = seen["mae_run_alive_timestamp_seconds"]["calm"]
    assert ended_s - seen["mae_run_started_timestamp_seconds"]["calm"] < RUN_DEADLINE_S
    assert abs(ended_s - seen["mae_run_checkpoint_timestamp_seconds"]["calm"]) < RUN_DEADLINE_S
    assert seen["mae_run_failures_total"] == seen["mae_run_bad_steps_total"] == {"calm": 0}
    assert seen["mae_dataset_complete"] == {place.dataset: 1}
    assert sum(seen["mae_dataset_images"].values()) == seen["mae_dataset_images"][f"{place.dataset} ok"] == 300
    assert seen["mae_registry_versions"] == {MODEL: 1}
    assert seen["mae_registry_alias_version"] == {f"candidate {MODEL}": 1}


def test_tensorboard_has_the_metrics_of_the_run_too(place: Place) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is absent; pip install '.[tensorboard]'",
    )
    events = accumulator.EventAccumulator(str(place.folder / "tb" / "calm"))
    events.Reload()
    found = events.Scalars("train/loss")[-1]
    assert (found.step, found.value) == (place.undisturbed["steps"], pytest.approx(place.undisturbed["loss"]))


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


@pytest.mark.long
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


@pytest.mark.long
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
