"""A pretraining run that is evaluated ends with the weights of one that is not, whatever becomes of the evaluations."""

import dataclasses
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mae_core.state import unpack
from pipelines.config import CheckpointConfig, PeriodicEvaluationConfig, PretrainConfig, TrackingConfig
from pipelines.dataset.manifest import read_manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.evaluation.periodic import PeriodicEvaluator
from pipelines.runs.folder import RunFolder
from pipelines.runs.metrics import Evaluations
from pipelines.storage import open_storage
from pipelines.worker.evaluations import EvaluationProcess, encoder_tensors
from tests.digest import tensors_digest
from tests.pipelines.drivers.small import pretraining, working_in
from tests.waiting import JOB_DEADLINE_S, join, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 6
STEPS_PER_EPOCH = 4
EVERY = 2
DUE = [EVERY * STEPS_PER_EPOCH * number for number in (1, 2, 3)]
# Some evaluations share the copy of a checkpoint and others do not.
RUN: dict[str, Any] = {
    "epochs": EPOCHS,
    "checkpoint": CheckpointConfig(every_epochs=3, keep=5),
    "tracking": TrackingConfig(register=False),
}
EVALUATE = PeriodicEvaluationConfig(every_epochs=EVERY, images=60, knn=True, wait_s=JOB_DEADLINE_S)


@dataclass(frozen=True)
class Place:
    """A dataset, an MLflow and a folder of runs, with a run in it that was not evaluated."""

    folder: Path
    dataset: str
    undisturbed: str
    """Digest of that run's weights."""

    def config(self, name: str, **changes: Any) -> PretrainConfig:
        return pretraining(self.folder, self.dataset, name, **RUN, **changes)

    def run(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def logged(self, run_id: str, key: str) -> dict[int, float]:
        """Return the values of a metric in MLflow by step. Raises AssertionError if a step has two."""
        from mlflow import MlflowClient

        history = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}").get_metric_history(run_id, key)
        found = {point.step: point.value for point in history}
        assert len(found) == len(history)
        return found


def weights(folder: RunFolder) -> str:
    return tensors_digest(unpack(folder.storage.read("export/mae.safetensors")))


@pytest.fixture(scope="module")
def place(few_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from pipelines.drivers.pretrain import pretrain

    folder = tmp_path_factory.mktemp("evaluated")
    with working_in(folder):
        found = pretrain(pretraining(folder, few_prepared, "calm", **RUN), "calm")
        assert "evaluation" not in found
        yield Place(folder, few_prepared, weights(RunFolder(found["folder"])))


def test_values_are_those_of_the_weights_at_their_step_in_run_folder_outcome_and_mlflow(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    config = place.config("watched", evaluate=EVALUATE)
    outcome, run = pretrain(config, "watched"), place.run("watched")
    assert weights(run) == place.undisturbed
    record = Evaluations(run.storage)
    # The model learns faster than the evaluation starts: those between the first and the last may be left out.
    assert {DUE[0], DUE[-1]} <= set(record.steps()) <= set(DUE)
    found = outcome["evaluation"]
    assert (found["done"], found["left_out"]) == (len(record.steps()), len(DUE) - len(record.steps()))
    last = record.read(DUE[-1])
    assert found["step"] == DUE[-1]
    for name in ("linear_top1", "knn_top1", "rankme"):
        logged = place.logged(outcome["run_id"], f"evaluate/{name}")
        assert logged == {step: record.read(step)[f"evaluate/{name}"] for step in record.steps()}
        assert found[name] == last[f"evaluate/{name}"]
    assert 0 <= outcome["goodput"]["evaluation"] <= 0.01

    checkpoint = run.checkpoints.load(DUE[-1])
    encoder = encoder_tensors(unpack(checkpoint.files["model.safetensors"]))
    manifest = read_manifest(open_storage(place.dataset))
    here = PeriodicEvaluator(config, pixels_of(manifest, 1), manifest)
    values = here.evaluate({name: tensor.numpy() for name, tensor in encoder.items()})
    assert {f"evaluate/{name}": pytest.approx(value, rel=1e-3) for name, value in values.items()} == {
        key: value for key, value in last.items() if key != "evaluate/duration_s"
    }


@pytest.mark.long
def test_an_evaluation_that_was_lost_with_its_process_is_done_when_the_run_resumes(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    pretrain(place.config("resumed", evaluate=EVALUATE), "resumed")
    run = place.run("resumed")
    before = {step: Evaluations(run.storage).read(step) for step in Evaluations(run.storage).steps()}
    run.storage.delete(f"evaluations/{DUE[-1]:012d}.jsonl")
    for path, _ in run.storage.list():
        if path.startswith("export/") or path in ("result.json", "outcome.json"):
            run.storage.delete(path)
    again = pretrain(place.config("resumed", evaluate=EVALUATE), "resumed")
    assert weights(run) == place.undisturbed
    after = {step: Evaluations(run.storage).read(step) for step in Evaluations(run.storage).steps()}
    for values in (*before.values(), *after.values()):
        values.pop("evaluate/duration_s")
    assert after == before
    assert set(place.logged(again["run_id"], "evaluate/rankme")) == set(after)


@pytest.mark.long
def test_images_that_cannot_be_read_cost_the_evaluations_and_nothing_else(
    place: Place,
) -> None:
    from pipelines.drivers.pretrain import pretrain

    dataset = place.folder / "damaged"
    shutil.copytree(place.dataset, dataset)
    for path in dataset.glob("val/*.parquet"):
        path.unlink()
    config = place.config("damaged", evaluate=EVALUATE)
    outcome = pretrain(dataclasses.replace(config, data=dataclasses.replace(config.data, uri=str(dataset))), "damaged")
    assert weights(place.run("damaged")) == place.undisturbed
    assert outcome["failures"] == 0
    assert outcome["evaluation"] == {"done": 0, "left_out": len(DUE)}
    assert not Evaluations(place.run("damaged").storage).steps()


@pytest.mark.long
def test_an_evaluation_whose_process_is_killed_costs_one_evaluation_and_nothing_else(place: Place) -> None:
    from pipelines.drivers.pretrain import pretrain

    wait_until(lambda: evaluating() is None, "the end of earlier evaluations")
    killed: list[int] = []

    def kill() -> None:
        process = wait_until(evaluating, "the evaluation's process", JOB_DEADLINE_S)
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)

    killer = threading.Thread(target=kill, name="killer")
    killer.start()
    outcome = pretrain(place.config("killed", evaluate=EVALUATE), "killed")
    join(killer)
    assert killed
    assert weights(place.run("killed")) == place.undisturbed
    assert outcome["failures"] == 0
    steps = Evaluations(place.run("killed").storage).steps()
    assert DUE[0] not in steps
    assert outcome["evaluation"]["step"] == steps[-1] == DUE[-1]


def evaluating() -> psutil.Process | None:
    """Return the process of the evaluation, if there is one: Ray names it after its class."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{EvaluationProcess.__name__}"):
                return process
        except (psutil.NoSuchProcess, IndexError):
            continue
    return None
