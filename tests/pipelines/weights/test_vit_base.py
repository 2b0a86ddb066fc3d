"""One model of real size: from the reference's file through further training and evaluation to every format."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig
from mae_core.formats import fair, transformers
from mae_core.model import build_mae
from mae_core.pretrained import load_mae
from mae_core.state import model_tensors
from pipelines.config import (
    ClassifyConfig,
    DataConfig,
    EvaluateConfig,
    ImportConfig,
    PrepareConfig,
    PretrainConfig,
)
from pipelines.registry import open_tracking
from tests.new_mlflow import new_mlflow
from tests.pipelines.weights.checks import assert_identical, check_encoder, exported, run_line

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

LICENCE = ("CC-BY-NC-4.0", "https://example.org/mae")
STEPS, BATCH = 2, 8


def sixteen_and_four(few: Path, folder: Path) -> Path:
    """Copy 16 training and 4 test images of two classes."""
    for split, count in {"train": STEPS * BATCH // 2, "test": 2}.items():
        for name in ("bag", "dress"):
            (folder / split / name).mkdir(parents=True)
            for path in sorted((few / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name / path.name)
    return folder


def test_a_reference_checkpoint_is_pretrained_further_evaluated_and_exported_to_every_format(
    tmp_path: Path, ray4: None, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.drivers.classify import finetune
    from pipelines.drivers.pretrain import pretrain
    from pipelines.evaluation.evaluate import evaluate
    from pipelines.prepare import prepare
    from pipelines.weights.importing import import_weights

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    prepare(str(sixteen_and_four(few, tmp_path / "images")), str(tmp_path / "data"), PrepareConfig())
    data = DataConfig(uri=str(tmp_path / "data"), batch=BATCH, micro_batch=BATCH)
    official = build_mae(ModelConfig(), seed=0)
    torch.save({"model": fair.from_ours(model_tensors(official)), "epoch": 799}, "mae_pretrain_vit_base.pth")
    imported = import_weights(
        "mae_pretrain_vit_base.pth", ImportConfig(name="mae-official", licence=LICENCE[0], origin=LICENCE[1])
    )
    assert imported["summary"] == "vit_base_patch16 at 224 x 224 px, 3 channels, decoder 8 x 512"

    continued = pretrain(
        PretrainConfig(
            name="mine",
            output=str(tmp_path / "runs"),
            epochs=1,
            backbone=imported["model"],
            data=data,
            optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.0),
        ),
        stated=(),
    )
    assert continued["steps"] == STEPS
    tracking = open_tracking("mae")
    version, folder = tracking.resolve(continued["model"]), tmp_path / "version"
    assert (version.tags["mae.licence"], version.tags["mae.origin"]) == LICENCE
    tracking.fetch(version, folder)
    mae, _ = load_mae(folder)
    changed = (mae.encoder.blocks[0].attn.qkv.weight - official.encoder.blocks[0].attn.qkv.weight).abs().max().item()  # pyright: ignore
    assert 1e-7 < changed < 1e-2, "trained from the imported weights, by a few steps"

    classifier = finetune(
        ClassifyConfig(
            name="classes",
            output=str(tmp_path / "runs"),
            backbone=version.uri,
            epochs=1,
            eval_split="test",
            data=data,
            classifier=ClassifierConfig(pool="avg", train_blocks=0.5),
            optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.0),
            augment=AugmentConfig(crop="none", flip=False),
        )
    )
    result = evaluate(EvaluateConfig(model=classifier["model"], data=data.uri, split="test", batch=4), "evaluation")
    assert result["num_images"] == 4
    assert result["metrics"]["top1"]["value"] == pytest.approx(classifier["top1"])

    ours = model_tensors(mae)
    for naming in ("timm", "transformers", "onnx", "torch"):
        check_encoder(folder, naming, out=naming, source=version.uri)
        provenance = json.loads((tmp_path / naming / "provenance.json").read_bytes())
        assert (provenance["licence"], provenance["model"]) == (LICENCE[0], version.uri)
    line = exported(version.uri, "timm", out="timm-whole")["load"]
    assert "create_model('vit_base_patch16_224'" in line
    assert "img_size" not in line
    assert_identical(fair.to_ours(run_line(exported(version.uri, "fair", out="fair")["load"])["tensors"]), ours)
    model = run_line(exported(version.uri, "transformers", out="mae")["load"])["model"]
    assert_identical(transformers.to_ours(model.state_dict()), ours)
