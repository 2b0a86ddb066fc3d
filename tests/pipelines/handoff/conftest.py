"""An MLflow with a registered backbone for images of 8 x 8 px in colour, and a labelled dataset for it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.registry import ModelRef, Tracking, open_tracking, register_backbone

MODEL_NAME = "mae-tiles"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """Open a sqlite MLflow, which MLFLOW_TRACKING_URI names meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
        yield open_tracking("mae")


@pytest.fixture(scope="module")
def backbone(tracking: Tracking) -> ModelRef:
    """Register a backbone with random weights."""
    return register(tracking, "pretraining")


def register(tracking: Tracking, run: str) -> ModelRef:
    """Register a further version."""
    from safetensors.torch import save

    from mae_core.config import MaskConfig, ModelConfig
    from mae_core.encoder import export_tensors
    from mae_core.model import build_mae
    from mae_core.normalization import Normalization

    config = ModelConfig(
        arch="vit_pico_patch4", image_px=(8, 8), mask=MaskConfig(ratio=0.5), decoder_depth=1, decoder_width=16,
        decoder_heads=2,
    )  # fmt: skip
    encoder = export_tensors(build_mae(config, seed=0).encoder)
    pixels = asdict(Normalization(mean=(0.4,) * 3, std=(0.3,) * 3))
    files: dict[str, bytes | Path] = {
        "encoder.safetensors": save({name: tensor.contiguous() for name, tensor in encoder.items()}),
        "config.json": json.dumps({"kind": "backbone", "model": asdict(config), "pixels": pixels}).encode(),
    }
    made_by = tracking.run(run, "pretrain", {})
    tags = {"mae.licence": "CC-BY-4.0", "mae.origin": "https://example.com/weights"}
    ref = register_backbone(made_by, files, MODEL_NAME, tags=tags)
    made_by.finish()
    return ref


def options(dataset: str) -> dict[str, object]:
    """Return what makes a fine-tuning on tiles as short as it can be."""
    return {
        "data.uri": dataset, "epochs": 1, "data.batch": 20, "data.micro_batch": 20, "optim.warmup_epochs": 0.0,
        "augment.crop": "none", "compute.data_tasks": 1,
    }  # fmt: skip


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
