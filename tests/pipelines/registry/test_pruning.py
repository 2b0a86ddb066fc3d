"""Pruning takes only what no alias, rollback, run or lineage needs, and lists before it deletes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_core.errors import UserError
from pipelines.config import PruneConfig
from pipelines.promotion.prune import prune
from pipelines.registry import Decision, ModelRef, Run, Tracking, open_tracking, register_backbone

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NOW = PruneConfig(keep=1, older_than_days=0)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def tracking(database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracking]:
    """Open a registry without any model: each test removes what it made."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    tracking = open_tracking("mae")
    yield tracking
    for model in tracking.client.search_registered_models():
        tracking.client.delete_registered_model(model.name)


def registered(run: Run, name: str, number: int, parent: ModelRef | None = None) -> ModelRef:
    config = json.dumps({"kind": "backbone", "pixels": {"mean": [0.3], "std": [0.35]}}).encode()
    return register_backbone(run, {"encoder.safetensors": bytes([number]), "config.json": config}, name, parent=parent)


def finished(tracking: Tracking, name: str) -> Run:
    run = tracking.run(name, "pretrain", {})
    run.finish()
    return run


@pytest.mark.slow
def test_what_an_alias_a_rollback_a_lineage_or_a_run_needs_is_kept_with_the_reason(tracking: Tracking) -> None:
    run = finished(tracking, "p")
    versions = [registered(run, "mae-p", number) for number in range(6)]
    child = registered(run, "mae-child", 9, parent=versions[0])
    history = tracking.history("mae-p", "champion")
    for ref in versions[1:3]:
        history = tracking.move_alias(history, ref, Decision(kind="promote"))
    running = tracking.run("r", "finetune", {})
    running.log_model_input(versions[3])
    found = prune(NOW)
    running.finish()
    assert found["garbage"] == ["models:/mae-p/5"]
    assert found["deleted"] == []
    assert found["kept"] == {
        "models:/mae-p/1": f"{child.uri} was made from it",
        "models:/mae-p/2": "a rollback of @champion can return to it",
        "models:/mae-p/3": "@champion",
        "models:/mae-p/4": "a running run started from it",
        "models:/mae-p/6": "@candidate",
        child.uri: "@candidate",
    }
    assert "not needed: models:/mae-p/5" in found["text"]
    assert tracking.resolve("models:/mae-p/5").version == 5


def test_what_is_deleted_takes_its_files_along_and_the_others_still_load(tracking: Tracking, tmp_path: Path) -> None:
    run = finished(tracking, "q")
    versions = [registered(run, "mae-q", number) for number in range(3)]
    folders = [Path(tracking.client.get_logged_model(ref.model_id).artifact_location) for ref in versions]
    assert all((folder / "MLmodel").is_file() for folder in folders)
    found = prune(PruneConfig(keep=1, older_than_days=0, delete=True))
    assert found["deleted"] == ["models:/mae-q/1", "models:/mae-q/2"]
    assert [folder.exists() for folder in folders] == [False, False, True]
    with pytest.raises(UserError, match="no version 1"):
        tracking.resolve("models:/mae-q/1")
    tracking.verify(tracking.resolve("models:/mae-q@candidate"))
    assert prune(NOW)["garbage"] == []


def test_a_version_that_gets_an_alias_after_it_was_listed_is_kept(tracking: Tracking) -> None:
    run = finished(tracking, "s")
    versions = [registered(run, "mae-s", number) for number in range(2)]
    (listed,) = tracking.find_garbage("mae-s", keep=1, older_than_days=0).garbage
    tracking.move_alias(tracking.history("mae-s", "champion"), versions[0], Decision(kind="promote"))
    assert not tracking.delete_garbage(listed)
    tracking.verify(tracking.resolve("models:/mae-s/1"))


def test_what_is_young_is_kept(tracking: Tracking) -> None:
    run = finished(tracking, "t")
    for number in range(3):
        registered(run, "mae-t", number)
    assert prune(PruneConfig(keep=1))["garbage"] == []


def test_an_upload_that_never_became_a_version_is_found_a_day_later(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tracking, "u")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.client, "create_model_version", killed)
        with pytest.raises(KeyboardInterrupt):
            registered(run, "mae-u", 0)
    ours = {model.model_id for model in tracking.client.search_logged_models([tracking.experiment_id])}
    assert not ours & set(prune(NOW)["garbage"])
    later_s = time.time() + 2 * 24 * 3600
    monkeypatch.setattr("pipelines.registry.pruning.time.time", lambda: later_s)
    (found,) = (uri for uri in prune(NOW)["garbage"] if _made_by(tracking, uri, run))
    location = Path(tracking.client.get_logged_model(found).artifact_location)
    assert found in prune(PruneConfig(keep=1, older_than_days=0, delete=True))["deleted"]
    assert not location.exists()


def _made_by(tracking: Tracking, model_id: str, run: Run) -> bool:
    return not model_id.startswith("models:/") and (tracking.client.get_logged_model(model_id).source_run_id == run.id)
