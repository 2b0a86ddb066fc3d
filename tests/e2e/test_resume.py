"""A pretraining run that was killed or stopped again and again equals one that nobody disturbed, bit for bit.

`make test` tries Ctrl-C, and kills of the loop alone in `pipelines/worker/test_kills.py`; `make test-long` tries kills
and both signals here. With three workers DDP's buckets matter, and a batch of four micro-batches needs placeholders.

One run of each size meets every fault, since each start of a worker group costs seconds: one worker is killed, one
hangs, all workers are killed (the driver starts the group again each time), then the driver is killed with everything
it started (the same command resumes the run).
"""

import json
import random
import shlex
import signal
from functools import partial
from typing import Any

import psutil
import pytest

from mae_core.state import unpack
from tests.digest import tensors_digest
from tests.e2e.driving import MAE, STEPS_PER_EPOCH, Place, ranks, runs, started, stop, wait_for, wait_for_step
from tests.waiting import JOB_DEADLINE_S, let_pass

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

# More windows than one execution of the feed has.
EPOCHS = 15
TOTAL = EPOCHS * STEPS_PER_EPOCH
STALL_S = 30.0
"""On a busy machine ranks may stand apart for longer than a few seconds without a fault."""


def command(place: Place, num_workers: int, name: str, **changes: Any) -> list[str]:
    compute = {"num_workers": num_workers, "max_failures": 5, "stall_s": STALL_S}
    return place.command(name, epochs=EPOCHS, compute=compute, **changes)


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_run_whose_processes_died_and_hung_equals_one_that_was_left_alone(place: Place, num_workers: int) -> None:
    name, wanted = f"killed-{num_workers}", f"undisturbed-{num_workers}"
    outcome(place, num_workers, wanted)
    chance, steps, group = random.SystemRandom(), [], list[psutil.Process]()

    def after_some_steps(driver: psutil.Process) -> list[psutil.Process]:
        """Return the ranks at a random moment after a random number of further steps."""
        # A group that dies may still commit the checkpoint that it was writing, which is no step of the next group.
        wait_for(lambda: not any(map(runs, group)), "the end of the group before", place, driver)
        steps.append(wait_for_step(place, name, place.newest(name) + chance.randint(3, 20), driver))
        let_pass(chance.uniform(0, 0.2))
        group[:] = ranks(driver)
        return list(group)

    with started(command(place, num_workers, name), place) as driver:
        chance.choice(after_some_steps(driver)).kill()
        hung = chance.choice(after_some_steps(driver))
        hung.suspend()
        hung.wait(JOB_DEADLINE_S)
        for rank in after_some_steps(driver):
            rank.kill()
        after_some_steps(driver)
    run = place.run_folder(name)
    assert run.read_result() is None, f"killed after {steps}: the run was over before"

    finished = place.run(command(place, num_workers, name))
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stderr
    assert weights(place, name) == weights(place, wanted), f"killed after {steps}"
    assert any(failure.endswith("did not answer for compute.stall_s") for failure in run.read_failures())
    result = run.read_result()
    assert result is not None
    assert result["goodput"]["recovery"] > 0
    check_mlflow(place, name, wanted)


def test_a_run_that_ctrl_c_stopped_equals_one_that_was_left_alone(place: Place) -> None:
    """SIGINT for the driver's process group, as Ctrl-C in a terminal."""
    outcome(place, 2, "undisturbed-2")
    words = command(place, 2, "interrupted", checkpoint={"every_epochs": 3.0})
    with started(words, place) as driver:
        wait_for_step(place, "interrupted", 3 * STEPS_PER_EPOCH, driver)
        step = stopped(place, driver, words, signal.SIGINT)
    assert 3 * STEPS_PER_EPOCH <= step < TOTAL
    finished = place.run(words)
    assert finished.returncode == 0, finished.stderr
    assert f"at step {step} with 2 workers" in finished.stderr
    assert json.loads(finished.stdout)["failures"] == 0
    assert weights(place, "interrupted") == weights(place, "undisturbed-2")
    check_mlflow(place, "interrupted", "undisturbed-2")


@pytest.mark.long
def test_a_run_that_both_signals_stopped_equals_one_that_was_left_alone(place: Place) -> None:
    """SIGTERM for the driver, as from Kubernetes; SIGINT for its process group, as Ctrl-C in a terminal."""
    outcome(place, 3, "undisturbed-3")
    words = command(place, 3, "stopped-3", checkpoint={"every_epochs": 3.0})
    with started(words, place) as driver:
        wait_for_step(place, "stopped-3", 3 * STEPS_PER_EPOCH, driver)
        first = stopped(place, driver, words, signal.SIGTERM)
    with started(words, place) as driver:
        wait_for_step(place, "stopped-3", first + 1, driver)
        second = stopped(place, driver, words, signal.SIGINT)
    assert 3 * STEPS_PER_EPOCH <= first < second < TOTAL
    finished = place.run(words)
    assert finished.returncode == 0, finished.stderr
    assert f"at step {second} with 3 workers" in finished.stderr
    assert json.loads(finished.stdout)["failures"] == 0
    assert weights(place, "stopped-3") == weights(place, "undisturbed-3")
    check_mlflow(place, "stopped-3", "undisturbed-3")


@pytest.mark.long
def test_a_run_that_is_stopped_at_random_moments_equals_one_that_was_left_alone(place: Place) -> None:
    """Half of the moments are in the start of Ray and of the workers, where there is nothing to save."""
    outcome(place, 2, "undisturbed-2")
    seed = random.SystemRandom().randrange(2**32)
    chance, steps = random.Random(seed), [0]
    words = command(place, 2, "stopped-2", checkpoint={"every_epochs": 100.0})
    while len(steps) < 25:
        with started(words, place) as driver:
            begun = ranks if len(steps) % 2 else psutil.Process.children
            wait_for(partial(begun, driver), "Ray, or its ranks", place, driver)
            let_pass(chance.uniform(0, 10))
            if not runs(driver):
                break
            steps.append(stopped(place, driver, words, chance.choice([signal.SIGTERM, signal.SIGINT])))
    assert steps == sorted(steps), f"seed {seed}"
    finished = place.run(words)
    assert finished.returncode == 0, finished.stderr
    assert weights(place, "stopped-2") == weights(place, "undisturbed-2"), f"seed {seed}, stopped at {steps}"


def stopped(place: Place, driver: psutil.Process, words: list[str], number: signal.Signals) -> int:
    """Stop the run by a signal and check how it ends; return the step that it stopped at."""
    name = words[words.index("--preset") + 1].rsplit("/", 1)[1].removesuffix(".yaml")
    said = stop(place, driver, number)
    step = place.newest(name)
    # Every step that was done is saved, also those after the newest periodic checkpoint.
    assert max(place.losses(name), default=0) == step
    again = shlex.join(["mae", *words[len(MAE) :]])
    assert said.splitlines()[-1] == f"mae: {name} stopped at step {step} of {TOTAL}; to resume: {again}"
    _, run = mlflow_run(place, name)
    assert run.info.status == "KILLED"
    assert run.data.tags["mae.interrupted"] == f"{number.name}: {name} stopped at step {step} of {TOTAL}"
    return step


def test_the_same_command_again_prints_the_finished_result_and_trains_nothing(place: Place) -> None:
    name = "undisturbed-2"
    first = outcome(place, 2, name)
    before = place.run_folder(name).storage.list()
    assert outcome(place, 2, name) == first
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
