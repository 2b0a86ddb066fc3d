"""What labels say is what classifiers learn: several classes an image, and images that have none."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from mae_core.config import AugmentConfig, ClassifierConfig, OptimConfig
from mae_core.pretrained import load_classifier
from pipelines.config import ClassifyConfig, ComputeConfig, DataConfig, PrepareConfig, TrackingConfig
from pipelines.dataset.manifest import read_manifest
from pipelines.images.decode import decode
from pipelines.storage import open_storage
from tests.new_mlflow import new_mlflow
from tests.pipelines.sources.packing import structs, table

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray4")]


def drawn(number: int, classes: list[str]) -> bytes:
    """Draw noise with a bright left half, a bright lower half, or both."""
    pixels = np.random.default_rng(number).integers(0, 60, (28, 28))
    pixels[:, :14] += 90 * ("left" in classes)
    pixels[14:] += 90 * ("low" in classes)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def config(folder: Path, **changes: Any) -> ClassifyConfig:
    fields: dict[str, Any] = {
        "output": str(folder / "runs"),
        "backbone": "random:vit_pico_patch7",
        "epochs": 8,
        "data": DataConfig(uri=str(folder / "data"), batch=32, micro_batch=16),
        "classifier": ClassifierConfig(method="finetune", pool="avg", drop_path=0.0),
        "optim": OptimConfig(base_lr=2e-2, warmup_epochs=1.0),
        "augment": AugmentConfig(crop="none", flip=False, mixup=0.0, cutmix=0.0),
        "compute": ComputeConfig(num_workers=2),
        "tracking": TrackingConfig(),
    }
    return ClassifyConfig(**fields | changes)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_classes_an_image_are_learnt_and_measured_as_scikit_learn_does(place: Path) -> None:
    from pipelines.drivers.classify import finetune
    from pipelines.prepare import prepare

    sets = [[], ["left"], ["low"], ["left", "low"]]
    for split, first, num in (("train", 0, 160), ("val", 1000, 40)):
        images = [drawn(first + i, sets[i % 4]) for i in range(num)]
        labels = [sets[i % 4] for i in range(num)]
        table(place / f"source/{split}.parquet", {"image": structs(images), "label": pa.array(labels)})
    prepare(str(place / "source"), str(place / "data"), PrepareConfig(multi_label=True, rows_per_group=8))
    outcome = finetune(config(place, name="several"), "finetune")
    assert "top1" not in outcome
    manifest = read_manifest(open_storage(place / "data"))
    classifier = load_classifier(place / "runs/several/export")
    rows = pq.read_table(place / "data/val").to_pylist()
    with torch.inference_mode():
        found = classifier(torch.from_numpy(np.stack([decode(row["image"], 1) for row in rows]))).numpy()
    targets = np.array([[c in manifest.label_sets[row["label"]] for c in range(2)] for row in rows])
    expected = np.mean([average_precision_score(targets[:, c], found[:, c]) for c in range(2)])
    assert outcome["map"] == pytest.approx(100 * expected, abs=0.1)
    assert outcome["map"] > 95, "bright halves are easy to see"
    assert ((found > 0.5) == targets).mean() > 0.9, "probabilities are of each class by itself"


def test_images_without_a_label_are_left_out_of_training_and_of_accuracy(place: Path) -> None:
    from pipelines.drivers.classify import finetune
    from pipelines.prepare import prepare

    for split, first, num in (("train", 0, 120), ("val", 1000, 42)):
        images = [drawn(first + i, ["left"] if i % 3 == 1 else []) for i in range(num)]
        labels = pa.array([(0.0, 1.0, None)[i % 3] for i in range(num)])
        table(place / f"source/{split}.parquet", {"image": structs(images), "label": labels})
    prepare(str(place / "source"), str(place / "data"), PrepareConfig(rows_per_group=8))
    assert read_manifest(open_storage(place / "data")).num_unlabelled == {"train": 40, "val": 14}
    outcome = finetune(config(place, name="some"), "finetune")
    assert outcome["num_train"] == 80
    assert outcome["top1"] == 100, "an image without a label would never be right"
    half = finetune(config(place, name="half", labels="50%", epochs=1), "finetune")
    assert half["num_train"] == 40
