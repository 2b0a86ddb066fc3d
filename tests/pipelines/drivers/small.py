"""What tests of drivers train: the smallest model for a few steps, with runs and an MLflow in a folder of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import ModelConfig, OptimConfig
from pipelines.config import CheckpointConfig, DataConfig, PretrainConfig
from tests.new_mlflow import new_mlflow

ARCH = "vit_pico_patch7"
MODEL = ModelConfig(arch=ARCH, image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=32, decoder_heads=2)


def pretraining(folder: Path, dataset: str, name: str, **changes: Any) -> PretrainConfig:
    """Return the config of a run of two epochs in runs/ of the folder."""
    values: dict[str, Any] = {
        "output": str(folder / "runs"),
        "epochs": 2,
        "model": MODEL,
        "data": DataConfig(uri=dataset, batch=64, micro_batch=32),
        "optim": OptimConfig(base_lr=1e-3, warmup_epochs=0.0),
        "checkpoint": CheckpointConfig(keep=5),
    }
    return PretrainConfig(name=name, **{**values, **changes})


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make the folder the working directory, with an MLflow of its own; ranks report to Ray Train often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", new_mlflow(folder))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.chdir(folder)
        yield
