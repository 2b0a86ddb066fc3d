"""From shards to a registered backbone to a classifier, through the registry alone, and back along the lineage."""

import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mae_core.config import AugmentConfig, ClassifierConfig, MaskConfig, ModelConfig, OptimConfig
from mae_core.errors import UserError
from mae_core.pretrained import load_encoder, load_mae
from mae_core.state import unpack
from pipelines.config import (
    ClassifyConfig,
    ComputeConfig,
    DataConfig,
    PretrainConfig,
    ReconstructConfig,
    RegisterConfig,
    TrackingConfig,
)
from pipelines.images.decode import decode
from pipelines.runs.folder import RunFolder
from pipelines.storage import open_storage, storage_of
from tests.digest import tensors_digest
from tests.pipelines.drivers.small import ARCH, pretraining, working_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining run whose folder is gone, and what was seen of it before."""

    folder: Path
    dataset: str
    outcome: dict[str, Any]
    by_hand: dict[str, Any]
    """What `mae register RUN@STEP` said, for the checkpoint before the last."""
    digests: dict[int, str]
    """Of the weights, by step."""


@pytest.fixture(scope="module")
def pretrained(few_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrained]:
    from pipelines.drivers.pretrain import pretrain
    from pipelines.drivers.register import register

    folder = tmp_path_factory.mktemp("handoff")
    with working_in(folder):
        outcome = pretrain(pretraining(folder, few_prepared, "mae"), "mae")
        run = RunFolder(str(folder / "runs" / "mae"))
        digests = {
            step: tensors_digest(unpack(run.checkpoints.load(step).files["model.safetensors"]))
            for step in run.checkpoints.steps()
        }
        by_hand = register(f"{folder / 'runs' / 'mae'}@{min(digests)}", RegisterConfig(name="by-hand"))
        run.storage.delete_tree()
        yield Pretrained(folder, few_prepared, outcome, by_hand, digests)


def classify(pretrained: Pretrained, method: Any, **changes: Any) -> ClassifyConfig:
    config = ClassifyConfig(
        output=str(pretrained.folder / "runs"),
        backbone=f"models:/mae-{ARCH}@candidate",
        epochs=2,
        data=DataConfig(uri=pretrained.dataset, batch=64, micro_batch=32),
        classifier=ClassifierConfig(method=method, pool="avg"),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.0),
        augment=AugmentConfig(crop="none", flip=False),
        tracking=TrackingConfig(),
    )
    return dataclasses.replace(config, **changes)


def fetched(uri: str, folder: Path) -> dict[str, Path]:
    from pipelines.registry import open_tracking

    tracking = open_tracking("mae")
    return tracking.fetch(tracking.resolve(uri), folder)


def test_a_finetune_needs_nothing_of_the_pretraining_run_but_the_registry(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    from pipelines.drivers.classify import finetune
    from pipelines.registry import open_tracking

    assert not open_storage(str(pretrained.folder / "runs" / "mae")).list()
    outcome = finetune(classify(pretrained, "finetune", name="tuned"), "finetune")
    assert outcome["kind"] == "finetune"
    assert outcome["split"] == "val"
    assert 0 <= outcome["top1"] <= 100
    assert outcome["backbone"] == f"models:/mae-{ARCH}/1"
    assert outcome["model"] == f"models:/mae-{ARCH}-classifier/1"
    assert set(fetched(outcome["model"], tmp_path)) >= {"classifier.safetensors", "config.json"}

    steps = open_tracking("mae").lineage(outcome["model"])
    assert [(step.kind, step.id) for step in steps[:5]] == [
        ("model version", outcome["model"]),
        ("run", outcome["run_id"]),
        ("model version", outcome["backbone"]),
        ("run", pretrained.outcome["run_id"]),
        ("dataset", open_tracking("mae").client.get_run(outcome["run_id"]).data.tags["mae.dataset_digest"]),
    ]
    assert steps[5].kind == "commit"


def test_the_registered_files_are_the_last_weights(pretrained: Pretrained, tmp_path: Path) -> None:
    files = fetched(pretrained.outcome["model"], tmp_path)
    assert set(files) >= {"encoder.safetensors", "mae.safetensors", "config.json", "manifest.json"}
    last = max(pretrained.digests)
    assert tensors_digest(unpack(files["mae.safetensors"].read_bytes())) == pretrained.digests[last]


def test_a_checkpoint_registered_by_hand_loads_and_is_the_one_asked_for(pretrained: Pretrained, tmp_path: Path) -> None:
    first = min(pretrained.digests)
    assert pretrained.by_hand["step"] == first
    assert pretrained.by_hand["model"] == "models:/by-hand/1"
    assert pretrained.by_hand["run_id"] == pretrained.outcome["run_id"]
    files = fetched("models:/by-hand@candidate", tmp_path)
    mae, _ = load_mae(files["mae.safetensors"].parent)
    assert tensors_digest(mae.state_dict()) == pretrained.digests[first]


@pytest.mark.s3
def test_reconstructions_are_drawn_from_the_registry_alone(pretrained: Pretrained, s3: str, tmp_path: Path) -> None:
    from PIL import Image

    from pipelines.pictures import reconstruct

    config = ReconstructConfig(
        model=f"models:/mae-{ARCH}@candidate", uri=pretrained.dataset, num_images=3, out=str(tmp_path / "a" / "b.png")
    )
    path = Path(reconstruct.run(config))
    assert path == tmp_path / "a" / "b.png"
    assert Image.open(io.BytesIO(path.read_bytes())).size[0] > 100
    there = reconstruct.run(replace(config, out=f"{s3}/{tmp_path.name}/b.png"))
    place, name = storage_of(there)
    assert place.read(name) == path.read_bytes()


def test_a_probe_registers_nothing_and_a_repetition_prints_the_same(pretrained: Pretrained) -> None:
    from pipelines.drivers.classify import probe

    config = classify(
        pretrained,
        "probe",
        name="probed",
        optim=OptimConfig(name="lars", base_lr=0.1, warmup_epochs=0.0, weight_decay=0.0),
    )
    outcome = probe(config, "probe")
    assert outcome["kind"] == "probe"
    assert "model" not in outcome
    assert probe(config, "probe") == outcome


def test_a_knn_probe_trains_nothing_and_counts_what_scikit_learn_counts(pretrained: Pretrained, tmp_path: Path) -> None:
    from pipelines.drivers.classify import probe

    config = classify(pretrained, "knn", name="neighbours", compute=ComputeConfig(num_workers=2))
    # The augmentation of another method is ignored: features are those of the evaluation view.
    outcome = probe(replace(config, augment=AugmentConfig()), "probe")
    assert (outcome["kind"], outcome["steps"]) == ("knn", 0)
    (train, train_labels), (val, val_labels) = (embedded(pretrained, split, tmp_path) for split in ("train", "val"))
    reference = KNeighborsClassifier(20, metric="cosine")
    reference.set_params(weights=lambda distance: np.exp((1 - distance) / 0.07))
    accuracy = (reference.fit(train, train_labels).predict(val) == val_labels).mean()
    assert outcome["top1"] == pytest.approx(100 * accuracy, abs=1e-3)
    assert outcome["num_train"] == len(train)


def embedded(pretrained: Pretrained, split: str, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a split, by the library."""
    fetched(f"models:/mae-{ARCH}@candidate", tmp_path)
    table = pq.read_table(Path(pretrained.dataset) / split)
    images = np.stack([decode(image, 1) for image in table["image"].to_pylist()])
    return load_encoder(tmp_path)(torch.from_numpy(images)).detach().numpy(), table["label"].to_numpy()


@pytest.mark.long
def test_an_attentive_probe_trains_on_a_share_of_the_labels(pretrained: Pretrained) -> None:
    from pipelines.drivers.classify import probe
    from pipelines.registry import open_tracking

    outcome = probe(classify(pretrained, "attentive", name="attentive", labels="10%"), "probe")
    assert outcome["kind"] == "attentive"
    sizes = np.unique(pq.read_table(Path(pretrained.dataset) / "train")["label"].to_numpy(), return_counts=True)[1]
    assert outcome["num_train"] == sum(max(1, round(0.1 * size)) for size in sizes.tolist())
    tags = open_tracking("mae").client.get_run(outcome["run_id"]).data.tags
    assert (tags["mae.kind"], tags["mae.num_train"]) == ("probe", str(outcome["num_train"]))


def test_a_config_of_the_other_method_is_refused() -> None:
    from pipelines.drivers.classify import finetune, probe

    with pytest.raises(UserError, match=r"method is 'finetune' but the function is probe\(\); call finetune\(\)"):
        probe(ClassifyConfig(), "probe")
    with pytest.raises(UserError, match=r"method is 'probe' but the function is finetune\(\); call probe\(\)"):
        finetune(ClassifyConfig(classifier=ClassifierConfig(method="probe")), "finetune")


def test_pretraining_continues_from_a_version_at_another_size_with_lineage(
    pretrained: Pretrained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.drivers.pretrain import pretrain
    from pipelines.drivers.register import register
    from pipelines.registry import PROVENANCE, Provenance, open_tracking

    version = f"models:/mae-{ARCH}/1"
    config = PretrainConfig(
        name="continued",
        output=str(pretrained.folder / "runs"),
        epochs=1,
        backbone=f"models:/mae-{ARCH}@candidate",
        data=DataConfig(uri=pretrained.dataset, batch=64, micro_batch=32),
        # So small a rate that the exported weights are the initial ones.
        optim=OptimConfig(base_lr=1e-12, warmup_epochs=0.0, weight_decay=0.0),
        model=ModelConfig(arch=ARCH, image_px=(14, 28), mask=MaskConfig(ratio=0.5)),
        tracking=TrackingConfig(name="mae-continued"),
    )
    with caplog.at_level("INFO"):
        outcome = pretrain(config, stated={"image_px", "mask.ratio"})
    assert "0 initialized" in caplog.text
    files = fetched(outcome["model"], tmp_path)
    values = json.loads(files["config.json"].read_bytes())
    assert (values["model"]["arch"], values["model"]["image_px"], values["model"]["mask"]["ratio"]) == (
        ARCH,
        [14, 28],
        0.5,
    )
    before = unpack(fetched(version, tmp_path / "before")["mae.safetensors"].read_bytes())
    after = unpack(files["mae.safetensors"].read_bytes())
    assert before.keys() == after.keys()
    for name in before.keys() - {"encoder.pos_embed", "decoder.pos_embed"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    steps = [(step.kind, step.id) for step in open_tracking("mae").lineage(outcome["model"])]
    assert steps[:3] == [
        ("model version", outcome["model"]),
        ("run", outcome["run_id"]),
        ("model version", version),
    ]
    assert pretrain(config, stated={"image_px", "mask.ratio"}) == outcome
    exported = Provenance.parse((Path(outcome["folder"]) / "export" / PROVENANCE).read_bytes(), "export")
    assert (exported.model, exported.parent) == ("run continued", version)
    by_hand = register(outcome["folder"], RegisterConfig(name="continued-by-hand"))["model"]
    assert open_tracking("mae").resolve(by_hand).tags["mae.parent"] == version
