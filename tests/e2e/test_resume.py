"""A pretraining run that was killed again and again equals one that nobody disturbed, bit for bit.

Two workers are tried by `make test-long`, three by `make test`: DDP's buckets matter from three on, and a batch of four
micro-batches then needs placeholders.

One run of each size is killed three times, since each start of a worker group costs seconds: one worker, then all
workers (the driver starts both again), then the driver with everything it started (the same command goes on). Another
run has a worker that hangs.
"""

import json
import random
import time
from typing import Any

import pytest

from mae_core.state import unpack
from tests.digest import tensors_digest
from tests.e2e.driving import STEPS_PER_EPOCH, Place, exit_status, ranks, started, wait_for_step

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

# More windows than a chapter of the feed has.
EPOCHS = 15
TOTAL = EPOCHS * STEPS_PER_EPOCH
STALL_S = 30.0
"""On a busy machine ranks may stand apart for longer than a few seconds without a fault."""


def command(place: Place, num_workers: int, name: str) -> list[str]:
    return place.command(name, epochs=EPOCHS, compute={"num_workers": num_workers, "max_failures": 3})


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_run_that_was_killed_equals_one_that_was_not(place: Place, num_workers: int) -> None:
    name, wanted = f"killed-{num_workers}", f"undisturbed-{num_workers}"
    outcome(place, num_workers, wanted)
    chance, steps = random.SystemRandom(), []
    with started(command(place, num_workers, name), place) as driver:
        steps.append(wait_for_step(place, name, chance.randint(1, 25), driver))
        time.sleep(chance.uniform(0, 0.2))
        chance.choice(ranks(driver)).kill()
        steps.append(wait_for_step(place, name, place.newest(name) + chance.randint(5, 25), driver))
        for rank in ranks(driver):
            rank.kill()
        steps.append(wait_for_step(place, name, place.newest(name) + chance.randint(5, 25), driver))
        time.sleep(chance.uniform(0, 0.2))
    assert place.run_folder(name).read_result() is None, f"killed after {steps}: the run was over before"

    finished = place.run(command(place, num_workers, name))
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stderr
    assert weights(place, name) == weights(place, wanted), f"killed after {steps}"
    check_mlflow(place, name, wanted)


def test_a_hung_worker_is_noticed_and_changes_nothing(place: Place) -> None:
    outcome(place, 3, "undisturbed-3")
    still = {"num_workers": 3, "max_failures": 3, "stall_s": STALL_S}
    with started(place.command("hung", epochs=EPOCHS, compute=still), place) as driver:
        wait_for_step(place, "hung", 9, driver)
        hung = random.SystemRandom().choice(ranks(driver))
        hung.suspend()
        before = place.newest("hung")
        assert exit_status(driver) == 0, place.log
        assert not hung.is_running(), "the worker that hung must be gone"
    assert before < TOTAL
    result = place.run_folder("hung").read_result()
    assert result is not None
    assert result["goodput"]["recovery"] > 0
    assert place.run_folder("hung").read_failures()[0].endswith("did not answer for compute.stall_s")
    assert weights(place, "hung") == weights(place, "undisturbed-3")


def test_the_same_command_again_prints_the_finished_result_and_trains_nothing(place: Place) -> None:
    name = "undisturbed-3"
    first = outcome(place, 3, name)
    before = place.run_folder(name).storage.list()
    assert outcome(place, 3, name) == first
    assert place.run_folder(name).storage.list() == before


@pytest.mark.long
def test_two_workers_and_three_see_the_same_batches(place: Place) -> None:
    losses = []
    for num_workers in (2, 3):
        outcome(place, num_workers, f"undisturbed-{num_workers}")
        losses.append(dict(points(place, f"undisturbed-{num_workers}", "train/loss")))
    assert losses[0].keys() == losses[1].keys()
    assert [losses[1][step] for step in losses[1]] == pytest.approx([losses[0][step] for step in losses[1]], rel=1e-3)


def outcome(place: Place, num_workers: int, name: str) -> dict[str, Any]:
    """Run the command to its end; return the outcome, which a finished run repeats."""
    done = place.run(command(place, num_workers, name))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights(place: Place, name: str) -> dict[str, str]:
    """Digest of every file of training state after the last step, and of what was exported."""
    exported = place.run_folder(name).storage.read("export/mae.safetensors")
    found = place.weights(name) | {"export": tensors_digest(unpack(exported))}
    assert found["step"] == str(TOTAL)
    return found


def points(place: Place, name: str, key: str) -> list[tuple[int, float]]:
    """Every (step, value) of a metric, as MLflow has it."""
    client, run = mlflow_run(place, name)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def mlflow_run(place: Place, name: str) -> tuple[Any, Any]:
    """Return MLflow's client and the only run of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=place.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("mae")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def check_mlflow(place: Place, name: str, wanted: str) -> None:
    """One run, finished, with each step of each metric once and the undisturbed values; one model version."""
    client, run = mlflow_run(place, name)
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "lr", "epoch"):
        found = sorted(points(place, name, key))
        assert [step for step, _ in found] == list(range(1, TOTAL + 1))
        assert found == sorted(points(place, wanted, key))
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert len(versions) == 1
