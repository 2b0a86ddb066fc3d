"""From candidate to champion and back, with classifiers on a real sqlite MLflow, without Ray."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.errors import UserError
from pipelines.cli import main
from pipelines.config import LineageConfig, PromoteConfig, RollbackConfig
from pipelines.dataset.manifest import Manifest
from pipelines.promotion import promote as promoting
from pipelines.promotion.lineage import lineage
from pipelines.promotion.promote import promote
from pipelines.promotion.rollback import rollback
from pipelines.registry import AliasMoved, Decision, Tracking, open_tracking, register_classifier

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NAME = "tiles-classifier"
GOOD, BAD, WIDE = f"{NAME}/1", f"{NAME}/2", f"{NAME}/3"
Tiles = tuple[str, Manifest]


def classifier_files(arch: str, sign: float) -> dict[str, bytes | Path]:
    """Return a classifier of the tiles, which are dark or bright: right if the sign is 1, wrong if it is -1."""
    torch.manual_seed(0)
    vit = build_classifier(parse_arch(arch), (8, 8), 3, 2, ClassifierConfig())
    config = {
        "kind": "classifier", "arch": arch, "image_px": [8, 8], "channels": 3, "classes": ["dark", "bright"],
        "classifier": {"method": "finetune", "pool": "avg"}, "pixels": {"mean": [0.4] * 3, "std": [0.3] * 3},
    }  # fmt: skip
    assert isinstance(vit.head, torch.nn.Linear)
    with torch.no_grad():
        flat = [torch.full((1, 3, 8, 8), value) for value in (-1.0, 1.0)]
        dark, bright = (vit.forward_head(vit.forward_features(image), pre_logits=True)[0] for image in flat)
        vit.head.weight.copy_(sign * torch.stack([dark - bright, bright - dark]))
        middle = (dark + bright) / 2
        vit.head.bias.copy_(-vit.head.weight @ middle)
    return {"classifier.safetensors": save(vit.state_dict()), "config.json": json.dumps(config).encode()}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """Three versions: a good classifier, a bad one, and a good one of a deeper encoder."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        tracking = open_tracking("mae")
        run = tracking.run("f", "finetune", {}, tags={"mae.dataset_digest": "d" * 64})
        for arch, sign in (("vit_pico_patch4", 1), ("vit_pico_patch4", -1), ("vit_nano_patch4", 1)):
            tags = {"mae.licence": "CC-BY-4.0", "mae.origin": "https://example.org"}
            register_classifier(run, classifier_files(arch, sign), None, NAME, tags=tags)
        run.finish()
        yield tracking


@pytest.fixture
def config(tracking: Tracking, tiles: Tiles, tmp_path: Path, request: pytest.FixtureRequest) -> PromoteConfig:
    """Promote to an alias of the test's own, by the shipped gate for classifiers."""
    alias = request.node.name[:60]
    return PromoteConfig(to=alias, gate="classifier_gate", data=(tiles[0],), output=str(tmp_path / "runs"))


def forced(config: PromoteConfig, why: str = "because") -> PromoteConfig:
    return dataclasses.replace(config, gate="", force=True, why=why)


def version_at(tracking: Tracking, alias: str) -> int:
    return tracking.history(NAME, alias).version


@pytest.mark.slow
def test_a_better_version_passes_and_a_worse_one_is_refused_with_numbers(
    tracking: Tracking, config: PromoteConfig
) -> None:
    promote(BAD, forced(config))
    passed = promote(GOOD, dataclasses.replace(config, why="best on tiles"))
    assert passed["promoted"]
    assert not passed["forced"]
    assert passed["figures"]["data/all/gain"] == 100
    refused = promote(BAD, config)
    assert (refused["ok"], refused["promoted"]) == (False, False)
    assert set(refused["unmet"]) == {"data/all/gain_low", "data/all/class_loss_low"}
    assert "not met: data/all/gain_low is -100.00, must be at least 0" in refused["text"]
    assert f"stays at version {version_at(tracking, config.to)}" in refused["text"]
    assert tracking.resolve(f"models:/{NAME}@{config.to}").version == 1
    tags = tracking.resolve(f"models:/{GOOD}").tags
    assert tags[f"mae.{config.to}.why"] == "best on tiles"
    assert tags[f"mae.{config.to}.gate"] == "classifier_gate"
    assert json.loads(tags[f"mae.{config.to}.figures"])["data/all/gain_low"] == 100


@pytest.mark.slow
def test_the_evaluation_is_a_run_linked_to_both_versions_with_figures_and_pictures(
    tracking: Tracking, config: PromoteConfig
) -> None:
    promote(BAD, forced(config))
    passed = promote(GOOD, config)
    run = tracking.client.get_run(passed["run_id"])
    assert run.inputs is not None
    candidate, champion = (tracking.resolve(f"models:/{name}") for name in (GOOD, BAD))
    assert {found.model_id for found in run.inputs.model_inputs} == {candidate.model_id, champion.model_id}
    assert (run.data.tags["mae.kind"], run.data.tags["mae.verdict"]) == ("gate", "passed")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["data/all/gain"] == 100
    assert len(run.inputs.dataset_inputs) == 1
    files = {found.path for found in tracking.client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "result.json", "gains.png", "classes.png"}
    shown = tracking.client.get_logged_model(candidate.model_id).metrics
    assert shown is not None
    assert {m.key: m.value for m in shown}["data/all/gain"] == 100


@pytest.mark.slow
def test_a_costlier_version_is_refused_and_force_says_so_in_the_history(
    tracking: Tracking, config: PromoteConfig
) -> None:
    promote(GOOD, forced(config))
    refused = promote(WIDE, config)
    assert refused["unmet"] == ["cost"]
    assert refused["figures"]["cost"] > 1
    moved = promote(WIDE, dataclasses.replace(config, force=True, why="the budget grew"))
    assert moved["promoted"]
    assert moved["forced"]
    (_, move) = tracking.history(NAME, config.to).moves
    assert (move.forced, move.why, move.gate, move.run_id) == (
        True, "the budget grew", "classifier_gate", refused["run_id"],
    )  # fmt: skip


@pytest.mark.slow
def test_the_first_version_needs_only_the_least_value(config: PromoteConfig, tmp_path: Path) -> None:
    gate = tmp_path / "strict.yaml"
    gate.write_text("kind: gate\nmin_value: 80\n")
    strict = dataclasses.replace(config, gate=str(gate))
    refused = promote(BAD, strict)
    assert refused["unmet"] == ["data/all/top1"]
    assert promote(GOOD, strict)["promoted"]
    assert "already" in promote(GOOD, strict)["text"]


@pytest.mark.slow
def test_who_loses_the_race_while_measuring_is_told(
    tracking: Tracking, config: PromoteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(BAD, forced(config))
    judge = promoting.judge

    def overtaken(*arguments: Any) -> Any:
        verdict = judge(*arguments)
        history = tracking.history(NAME, config.to)
        tracking.move_alias(history, tracking.resolve(f"models:/{WIDE}"), Decision(kind="promote"))
        return verdict

    monkeypatch.setattr(promoting, "judge", overtaken)
    with pytest.raises(AliasMoved, match="moved from version 2 to version 3 by"):
        promote(GOOD, config)
    assert tracking.resolve(f"models:/{NAME}@{config.to}").version == 3


def test_rollback_returns_to_the_version_before_and_then_says_there_is_none(
    tracking: Tracking, config: PromoteConfig
) -> None:
    to = RollbackConfig(to=config.to, why="worse at night")
    with pytest.raises(UserError, match="does not exist, so there is no version"):
        rollback(NAME, to)
    for version in (BAD, GOOD):
        promote(version, forced(config))
    assert rollback(NAME, to)["model"] == f"models:/{BAD}"
    assert tracking.resolve(f"models:/{NAME}@{config.to}").version == 2
    with pytest.raises(UserError, match="points to version 2, its first"):
        rollback(NAME, to)


def test_a_version_that_was_altered_is_refused_by_name_even_if_forced(
    tracking: Tracking, config: PromoteConfig
) -> None:
    run = tracking.run("g", "finetune", {})
    ref = register_classifier(run, classifier_files("vit_pico_patch4", 0.5), None, NAME)
    run.finish()
    promote(f"{NAME}/{ref.version}", forced(config))
    promote(GOOD, forced(config))
    location = tracking.client.get_logged_model(ref.model_id).artifact_location
    stored = Path(location, "artifacts/classifier.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    said = f"classifier.safetensors of {ref.uri} has sha256"
    with pytest.raises(UserError, match=said):
        promote(f"{NAME}/{ref.version}", forced(config))
    with pytest.raises(UserError, match=said):
        rollback(NAME, RollbackConfig(to=config.to))
    assert version_at(tracking, config.to) == 1


def test_lineage_is_text_json_and_a_picture(config: PromoteConfig, tmp_path: Path) -> None:
    promote(GOOD, forced(config, "first of all"))
    found = lineage(f"{NAME}@{config.to}", LineageConfig(out=str(tmp_path / "lineage.png")))
    assert (found["model"], found["licence"], found["origin"]) == (
        f"models:/{GOOD}", "CC-BY-4.0", "https://example.org",
    )  # fmt: skip
    assert (found["datasets"], found["is_complete"]) == (["d" * 64], True)
    assert "first of all" in found["text"]
    assert json.loads(json.dumps(found))["steps"][0]["id"] == f"models:/{GOOD}"
    with Image.open(tmp_path / "lineage.png") as picture:
        assert picture.width > 1000


def test_a_lost_parent_is_marked_as_missing(tracking: Tracking) -> None:
    run = tracking.run("h", "finetune", {})
    parent = register_classifier(run, classifier_files("vit_pico_patch4", 1), None, "lost")
    child = register_classifier(run, classifier_files("vit_pico_patch4", 1), parent)
    run.finish()
    tracking.client.delete_model_version("lost", "1")
    found = lineage(child.uri, LineageConfig())
    assert not found["is_complete"]
    assert "has no version 1" in found["text"]


def test_a_gate_or_force_with_a_reason_is_needed(config: PromoteConfig) -> None:
    with pytest.raises(UserError, match="no gate is given; try --gate nano_gate"):
        promote(GOOD, dataclasses.replace(config, gate=""))
    with pytest.raises(UserError, match="--force needs a reason"):
        PromoteConfig(force=True)
    with pytest.raises(UserError, match="the gate names no dataset"):
        promote(GOOD, dataclasses.replace(config, data=()))


@pytest.mark.slow
def test_a_refusal_is_exit_status_1_and_prints_the_numbers(
    config: PromoteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(GOOD, forced(config))
    argv = ["promote", BAD, "--to", config.to, "--gate", config.gate, "--data", config.data[0]]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--output", config.output])
    assert stopped.value.code == 1
    assert "is refused by classifier_gate" in capsys.readouterr().out
