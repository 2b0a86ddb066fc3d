"""An evaluation, from a prepared split to result.json, without Ray."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from sklearn import metrics as sk

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.errors import UserError
from pipelines.config import EvaluateConfig
from pipelines.dataset.manifest import Manifest
from pipelines.evaluation import predictions
from pipelines.evaluation.evaluate import check_classes, evaluate
from pipelines.evaluation.predictions import read_predictions
from pipelines.registry import open_tracking, register_classifier
from pipelines.storage import open_storage
from tests.new_mlflow import new_mlflow

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

ARCH, CLASSES = "vit_pico_patch4", ("bright", "dark", "other")
Tiles = tuple[str, Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a classifier with random weights, whose classes are the tiles' in another order and one more."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vit = build_classifier(parse_arch(ARCH), (8, 8), 3, len(CLASSES), ClassifierConfig(head_std=0.5))
    save_file(vit.state_dict(), folder / "classifier.safetensors")
    config = {
        "kind": "classifier", "arch": ARCH, "image_px": [8, 8], "channels": 3, "classes": list(CLASSES),
        "classifier": {"method": "finetune", "pool": "avg"}, "pixels": {"mean": [0.4] * 3, "std": [0.3] * 3},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def config(model: Path, tiles: Tiles) -> EvaluateConfig:
    return EvaluateConfig(model=str(model), data=tiles[0], num_resamples=100, log=False)


def damage(tiles: Tiles, rows: list[int]) -> None:
    """Cut the images of these rows of val short."""
    path = next((Path(tiles[0]) / "val").glob("*.parquet"))
    table = pq.read_table(path)
    images = [image[:60] if i in rows else image for i, image in enumerate(table["image"].to_pylist())]
    table = table.set_column(0, table.schema.field("image"), [images])
    pq.write_table(table, path, row_group_size=8)


def test_metrics_equal_scikit_learns_on_the_written_parquet(config: EvaluateConfig, tmp_path: Path) -> None:
    result = evaluate(config, str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "predictions")
    assert table.column_names == ["id", "source", "label", "predicted", "probabilities", "error"]
    assert table["source"].to_pylist() == [str(i) for i in range(20)]
    assert table["id"].to_pylist() == list(range(40, 60))
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    labels, predicted = table["label"].to_pylist(), table["predicted"].to_pylist()
    assert labels == ["dark", "bright"] * 10
    assert result["metrics"]["top1"]["value"] == pytest.approx(100 * sk.accuracy_score(labels, predicted))
    probabilities = np.array(table["probabilities"].to_pylist())
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    area = sk.roc_auc_score([label == "bright" for label in labels], probabilities[:, 0])
    assert result["per_class"]["bright"]["auroc"] == pytest.approx(100 * area)
    assert result["absent_classes"] == ["other"]
    assert "1 of 3 classes have no image in the split and are left out of macro means: other" in result["notes"]


def test_files_hold_what_is_printed(config: EvaluateConfig, tmp_path: Path) -> None:
    result = evaluate(config, str(tmp_path / "out"))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "confusion.png", "evaluation.json", "predictions", "reliability.png", "report.html", "result.json",
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "text"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert f"{result['metrics']['top1']['value']:.2f}" in report


def test_undecodable_images_are_counted_and_named(config: EvaluateConfig, tiles: Tiles, tmp_path: Path) -> None:
    damage(tiles, [3, 11])
    result = evaluate(config, str(tmp_path / "out"))
    assert (result["num_images"], result["num_evaluated"], result["num_undecodable"]) == (20, 18, 2)
    assert [row["source"] for row in result["undecodable"]] == ["3", "11"]
    assert all("damaged" in row["reason"] for row in result["undecodable"])
    table = pq.read_table(tmp_path / "out" / "predictions")
    assert [i for i, row in enumerate(table["predicted"].to_pylist()) if row is None] == [3, 11]
    assert "could not be decoded" in (tmp_path / "out" / "report.html").read_text()


def test_a_split_without_one_whole_image_is_refused(config: EvaluateConfig, tiles: Tiles, tmp_path: Path) -> None:
    damage(tiles, list(range(20)))
    with pytest.raises(UserError, match="none of the 20 images of split 'val' can be decoded"):
        evaluate(config, str(tmp_path / "out"))


@pytest.mark.slow
def test_a_rerun_computes_only_the_missing_parts(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_ROWS_PER_PART", 8)
    written: list[str] = []
    write: Callable[..., None] = predictions._write

    def counted(out: Any, path: str, *rest: Any) -> None:
        written.append(path)
        write(out, path, *rest)

    monkeypatch.setattr(predictions, "_write", counted)
    first = evaluate(config, str(tmp_path / "out"))
    assert len(written) == 3
    (tmp_path / "out" / written.pop()).unlink()
    written.clear()
    assert evaluate(config, str(tmp_path / "out")) == first
    assert written == ["predictions/part-00002.parquet"]


def test_the_batch_changes_no_prediction(config: EvaluateConfig, model: Path, tmp_path: Path) -> None:
    evaluate(config, str(tmp_path / "a"))
    evaluate(dataclasses.replace(config, batch=3), str(tmp_path / "b"))
    a, b = (read_predictions(open_storage(tmp_path / name), CLASSES)[0] for name in "ab")
    np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-5)


def test_a_folder_of_another_evaluation_or_of_something_else_is_refused(
    config: EvaluateConfig, model: Path, tmp_path: Path
) -> None:
    evaluate(config, str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds the evaluation of another split; choose another folder"):
        evaluate(dataclasses.replace(config, split="train"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="is not empty and holds no evaluation"):
        evaluate(config, str(model))


def test_a_class_that_the_classifier_does_not_know_is_named_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"1 of the 2 classes of d are unknown to m: fish; it knows cat, dog; rename"):
        check_classes(["cat", "fish"], ["cat", "dog"], "d", "m")
    check_classes(["dog"], ["cat", "dog"], "d", "m")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ""}, "no dataset is given; try --data"),
        ({"split": "test"}, "the dataset has no split 'test', only train, val; choose one of these"),
        (
            {"model": "nowhere"},
            "nowhere has no config.json; give models:/NAME@ALIAS, or the export/ folder of a finished",
        ),
        ({"gpu": True}, "--gpu was given but torch finds no GPU"),
    ],
)
def test_wrong_input_is_refused(
    config: EvaluateConfig, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        evaluate(dataclasses.replace(config, **changes), str(tmp_path / "out"))


@pytest.mark.slow
def test_a_registered_classifier_gets_a_run_with_its_version_metrics_and_pictures(
    config: EvaluateConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    tracking = open_tracking("mae")
    trained = tracking.run("tuned", "finetune", {})
    files: dict[str, bytes | Path] = {path.name: path for path in model.iterdir()}
    ref = register_classifier(trained, files, None, "tiles")
    trained.finish()
    config = dataclasses.replace(config, model="models:/tiles@candidate", log=True)
    result = evaluate(config, str(tmp_path / "out"))
    assert result["model"] == ref.uri
    run = tracking.client.get_run(result["run_id"])
    assert (run.data.tags["mae.kind"], run.data.tags["mae.model"]) == ("evaluate", ref.uri)
    assert run.inputs is not None
    assert [model_input.model_id for model_input in run.inputs.model_inputs] == [ref.model_id]
    assert run.inputs.dataset_inputs[0].tags[0].value == "evaluation"
    assert run.data.metrics["val/top1"] == pytest.approx(result["metrics"]["top1"]["value"])
    assert run.data.metrics["val/top1_low"] == pytest.approx(result["metrics"]["top1"]["low"])
    names = {file.path for file in tracking.client.list_artifacts(result["run_id"])}
    assert names == {"confusion.png", "reliability.png", "report.html", "result.json"}
    shutil.rmtree(tmp_path / "out")
    assert evaluate(config, str(tmp_path / "out"))["run_id"] == result["run_id"]
