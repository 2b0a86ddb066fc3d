"""Predictions are the classifier's, every image is accounted for, and a resumed run equals an undisturbed one."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.errors import UserError
from mae_core.pretrained import load_classifier
from pipelines.cli import parse
from pipelines.config import PredictConfig
from pipelines.dataset.manifest import Manifest
from pipelines.embedding.parts import PartWorker
from pipelines.embedding.predict import predict
from pipelines.images.decode import decode, evaluation_view
from tests.pipelines.prepare.test_prepare import files_of, fill

pytestmark = pytest.mark.usefixtures("in_process")
CLASSES = ("cat", "dog", "égret")
CONFIG = PredictConfig(batch=8, rows_per_part=16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that exports a classifier with random weights for 8 x 8 px in colour."""

    def export(**changes: Any) -> str:
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(0)
        vit = build_classifier(parse_arch("vit_pico_patch4"), (8, 8), 3, len(CLASSES), ClassifierConfig(head_std=1.0))
        save_file({name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, folder / WEIGHTS)
        config = {
            "kind": "classifier",
            "arch": "vit_pico_patch4",
            "image_px": [8, 8],
            "channels": 3,
            "classes": CLASSES,
        }
        config |= {"pixels": {"mean": [0.4] * 3, "std": [0.3] * 3}, "classifier": {"method": "finetune"}, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return export


WEIGHTS = "classifier.safetensors"


@pytest.fixture(scope="module")
def classifier(exported: Callable[..., str]) -> str:
    return exported()


def rows_of(out: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((out / "parts").glob("*.parquet"))]
    assert json.loads(tables[0].schema.metadata[b"classes"]) == list(CLASSES)
    return [row for table in tables for row in table.to_pylist()]


def test_predictions_equal_the_classifiers_on_the_same_pixels(classifier: str, few: Path, tmp_path: Path) -> None:
    result = predict(classifier, str(few / "test"), str(tmp_path / "out"), CONFIG)
    assert (result["num_found"], result["num_rows"], result["num_quarantined"]) == (60, 60, 0)
    assert result["classes"] == list(CLASSES)
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == ["id", "source", "split", "label", "predicted", "score", "probabilities"]
    images = [evaluation_view(decode((few / "test" / row["source"]).read_bytes(), 3), (8, 8)) for row in rows[:8]]
    with torch.inference_mode():
        expected = load_classifier(classifier)(torch.from_numpy(np.stack(images))).numpy()
    # A batch of the same images in the same order gives the same bits.
    np.testing.assert_array_equal(np.array([row["probabilities"] for row in rows[:8]], np.float32), expected)
    assert [row["predicted"] for row in rows[:8]] == [CLASSES[i] for i in expected.argmax(1)]
    np.testing.assert_array_equal(np.array([row["score"] for row in rows[:8]], np.float32), expected.max(1))
    assert len({row["predicted"] for row in rows}) > 1


def test_several_classes_an_image_are_those_of_probability_one_half(
    exported: Callable[..., str], tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    predict(exported(multi_label=True), tiles[0], str(tmp_path / "out"), CONFIG)
    rows = rows_of(tmp_path / "out")
    assert "score" not in rows[0]
    for row in rows:
        assert row["predicted"] == [name for name, p in zip(CLASSES, row["probabilities"]) if p >= 0.5]
    assert {len(row["predicted"]) for row in rows} != {1}
    assert [row["label"] for row in rows] == ["dark", "bright"] * 30


def test_every_image_is_predicted_or_in_quarantine(classifier: str, zoo: list, tmp_path: Path) -> None:
    source = fill(tmp_path / "zoo", {animal.name: animal.content for animal in zoo})
    result = predict(classifier, str(source), str(tmp_path / "out"), dataclasses.replace(CONFIG, max_bad=1))
    bad = {animal.name for animal in zoo if animal.reason}
    assert result["num_found"] == len(zoo) == result["num_rows"] + result["num_quarantined"]
    assert {row["source"] for row in rows_of(tmp_path / "out")} == {animal.name for animal in zoo} - bad
    quarantined = [row for path in (tmp_path / "out/quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["source"] for row in quarantined} == bad
    assert result["num_quarantined"] == len(quarantined) == sum(result["reasons"].values())


def test_a_rerun_computes_only_the_missing_parts_and_ends_in_the_same_bytes(
    classifier: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(few / "test")
    predict(classifier, source, str(tmp_path / "a"), CONFIG)
    computed: list[int] = []
    call = PartWorker.__call__

    def killed_at_five(worker: PartWorker, row: dict[str, Any]) -> dict[str, int]:
        computed.append(row["number"])
        if len(computed) == 5:
            raise KeyboardInterrupt
        return call(worker, row)

    monkeypatch.setattr(PartWorker, "__call__", killed_at_five)
    with pytest.raises(KeyboardInterrupt, match="stopped with 4 of 8 parts done"):
        predict(classifier, source, str(tmp_path / "b"), CONFIG)
    assert not (tmp_path / "b/predictions.json").exists()
    predict(classifier, source, str(tmp_path / "b"), CONFIG)
    assert sorted(computed) == sorted([*range(8), 4])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with pytest.raises(UserError, match="holds the predictions of another config"):
        predict(classifier, source, str(tmp_path / "b"), dataclasses.replace(CONFIG, rows_per_part=8))


def test_a_backbone_is_refused_with_what_to_give_instead(backbone: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no classifier.safetensors; give a classifier such as models:/mae-<arch>-c"
    ):
        predict(str(backbone), str(few), str(tmp_path / "out"), CONFIG)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_model_source_and_out() -> None:
    call = parse(["predict", "models:/a@champion", "s3://b/images", "out", "--batch", "16"])
    assert call.arguments == ("models:/a@champion", "s3://b/images", "out")
    assert call.config == PredictConfig(batch=16)
