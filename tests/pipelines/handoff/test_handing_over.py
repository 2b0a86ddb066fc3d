"""On a real MLflow: what has the alias is trained from, once, and the classifier knows where it came from."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_core.errors import UserError
from pipelines.cli.attempt import attempt
from pipelines.config import HandoffConfig, HandoffPlan
from pipelines.dataset.manifest import Manifest
from pipelines.handoff.executors import Here
from pipelines.handoff.handing_over import handoff, look
from pipelines.handoff.jobs_file import read_plan
from pipelines.handoff.ledger import Claim, Ledger, Process
from pipelines.registry import ModelRef, Tracking, TrackingUnreachable
from pipelines.storage import open_storage
from tests.pipelines.handoff.conftest import MODEL_NAME, options, register
from tests.waiting import COMMAND_DEADLINE_S, RUN_DEADLINE_S, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
Tiles = tuple[str, Manifest]


def plan_of(folder: Path, dataset: str, **values: Any) -> HandoffPlan:
    job = {"name": "tiles", "model": MODEL_NAME, "options": options(dataset)}
    content = {"output": str(folder / "runs"), "jobs": [job], **values}
    (folder / "handoff.yaml").write_text(yaml.safe_dump(content))
    return read_plan(str(folder / "handoff.yaml"))


class Elsewhere(Here):
    """Claims are enough: nothing is started."""

    def start(self, ledger: Ledger, number: int, claim: Claim) -> None:
        pass


@pytest.fixture
def executor() -> Elsewhere:
    return Elsewhere(threading.Event())


@pytest.mark.slow
def test_without_an_alias_nothing_is_trained_and_a_wrong_job_keeps_no_other_from_being(
    tracking: Tracking, backbone: ModelRef, tiles: Tiles, working_dir: Path, executor: Elsewhere
) -> None:
    jobs = [
        {"name": "unknown", "model": "mae-none", "options": options(tiles[0])},
        {"name": "early", "model": MODEL_NAME, "alias": "nobody", "options": options(tiles[0])},
        {"name": "broken", "model": MODEL_NAME, "alias": "candidate", "options": options(str(working_dir / "none"))},
        {"name": "good", "model": MODEL_NAME, "alias": "candidate", "options": options(tiles[0])},
    ]
    statuses = look(plan_of(working_dir, tiles[0], jobs=jobs), executor)
    assert [status.state for status in statuses] == ["no version", "no version", "wrong", "running"]
    assert statuses[1].said == f"nothing is models:/{MODEL_NAME}@nobody yet"
    assert "none" in statuses[2].said
    assert statuses[3].version == backbone.uri


def test_a_moved_alias_is_another_training_and_moved_back_the_same(
    tracking: Tracking, backbone: ModelRef, tiles: Tiles, working_dir: Path, executor: Elsewhere
) -> None:
    plan, output = plan_of(working_dir, tiles[0], max_running=9), open_storage(working_dir / "runs")

    def champion(ref: ModelRef) -> str:
        tracking.client.set_registered_model_alias(MODEL_NAME, "champion", str(ref.version))
        (status,) = look(plan, executor)
        assert status.version == ref.uri
        return status.run

    other = register(tracking, "another-pretraining")
    runs = [champion(backbone), champion(other), champion(backbone)]
    assert (runs[0], len(set(runs))) == (runs[2], 2)
    assert [Ledger(output, run).last() for run in runs] == [1, 1, 1]


def test_a_finished_run_counts_after_its_folder_is_gone(
    tracking: Tracking, backbone: ModelRef, tiles: Tiles, working_dir: Path, executor: Elsewhere
) -> None:
    tracking.client.set_registered_model_alias(MODEL_NAME, "champion", str(backbone.version))
    plan = plan_of(working_dir, tiles[0])
    (status,) = look(plan, executor)
    run = tracking.run(status.run, "finetune", {})
    assert not tracking.has_finished("mae", status.run)
    run.finish()
    assert tracking.has_finished("mae", status.run)
    assert not tracking.has_finished("no such experiment", status.run)
    plan = plan_of(working_dir, tiles[0], output=str(working_dir / "elsewhere"))
    assert [status.state for status in look(plan, executor)] == ["finished"]


def test_an_mlflow_that_does_not_answer_ends_a_pass(
    working_dir: Path, tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of(working_dir, tiles[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingUnreachable, match="does not respond; start it"):
        handoff(HandoffConfig())


def test_a_cluster_with_a_local_mlflow_is_refused(tracking: Tracking, working_dir: Path, tiles: Tiles) -> None:
    plan_of(working_dir, tiles[0])
    with pytest.raises(UserError, match="start `mlflow server`"):
        handoff(HandoffConfig(address="http://ray-head.example:8265"))


def test_an_attempt_runs_trainings_only(working_dir: Path) -> None:
    ledger = Ledger(open_storage(working_dir / "runs"), "a")
    claim = Claim(where="here", words=("submit", "rm"), by=Process.this(), time_s=0.0)
    ledger.claim(1, claim)
    with pytest.raises(UserError, match="neither finetune nor probe"):
        attempt([ledger.output.uri, "a", "1", claim.token, str(working_dir / "log")])


@pytest.mark.ray
@pytest.mark.slow
def test_a_champion_becomes_a_classifier_with_its_lineage_and_only_once(
    tracking: Tracking, backbone: ModelRef, tiles: Tiles, working_dir: Path
) -> None:
    tracking.client.set_registered_model_alias(MODEL_NAME, "chosen", str(backbone.version))
    job = {"name": "embedded", "model": MODEL_NAME, "alias": "chosen", "options": options(tiles[0])}
    plan_of(working_dir, tiles[0], jobs=[job])

    def mae_handoff() -> dict[str, Any]:
        words = [sys.executable, "-m", "pipelines", "handoff", "--jobs", "handoff.yaml", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=RUN_DEADLINE_S)
        logs = [path.read_text() for path in working_dir.rglob("*.log")]
        assert done.returncode == 0, (done.stderr, logs)
        (found,) = json.loads(done.stdout)["jobs"]
        return found

    found = mae_handoff()
    assert (found["state"], found["attempt"], found["said"]) == ("finished", 1, f"models:/{MODEL_NAME}-classifier/1")
    ref = tracking.resolve(found["said"])
    digest = found["run"].rpartition("-")[2]
    assert {"handoff.job": "embedded", "handoff.config": digest}.items() <= ref.tags.items()
    assert {"mae.parent": backbone.uri, "mae.licence": "CC-BY-4.0"}.items() <= ref.tags.items()
    steps = tracking.lineage(ref.uri)
    assert [step.id for step in steps if step.kind == "model version"] == [ref.uri, backbone.uri]
    assert tracking.client.get_run(ref.run_id).data.tags["handoff.job"] == "embedded"
    assert mae_handoff() == found
    assert len(tracking.client.search_model_versions(f"name = '{MODEL_NAME}-classifier'")) == 1


@pytest.mark.slow
def test_a_watch_ends_in_order_on_a_signal_and_a_webhook_wakes_it(
    tracking: Tracking, backbone: ModelRef, tiles: Tiles, working_dir: Path
) -> None:
    job = {"name": "later", "model": MODEL_NAME, "alias": "nobody", "options": options(tiles[0])}
    plan_of(working_dir, tiles[0], jobs=[job])
    words = [sys.executable, "-m", "pipelines", "handoff", "--watch", "--every-s", "3600", "--webhook-port", "0"]
    environment = {**os.environ, "MAE_WEBHOOK_SECRET": "0123456789abcdef"}
    with (working_dir / "log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:

        def said() -> str:
            return (working_dir / "log").read_text()

        def until(text: str) -> None:
            alive = lambda: process.poll() is None  # noqa: E731
            wait_until(lambda: text in said(), lambda: f"{text!r} in {said()!r}", COMMAND_DEADLINE_S, alive=alive)

        until(f"later: no version, nothing is models:/{MODEL_NAME}@nobody yet")
        # What it says after the webhook shows that it looked again, long before an hour has passed.
        job["options"] = options(str(working_dir / "none"))
        job["alias"] = "candidate"
        plan_of(working_dir, tiles[0], jobs=[job])
        url = said().split("webhooks at ")[1].split()[0]
        from tests.pipelines.handoff.test_webhook import post, signed

        assert post(url, b"{}", signed("{}")) == 204
        until("later: wrong")
        process.terminate()
        assert process.wait(COMMAND_DEADLINE_S) == 143
        assert "mae: stopped; to resume: mae handoff --watch" in said()
    finally:
        process.kill()
        process.wait()
