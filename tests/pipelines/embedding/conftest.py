"""An exported backbone with random weights for images of 8 x 8 px, and commands that run without Ray."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import MaskConfig, ModelConfig
from tests.backbones import export_random


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a backbone that takes 8 x 8 px in colour. Tests must not write to the folder."""
    folder = tmp_path_factory.mktemp("backbone")
    config = ModelConfig(
        arch="vit_pico_patch4", image_px=(8, 8), mask=MaskConfig(ratio=0.5), decoder_depth=1, decoder_width=16,
        decoder_heads=2,
    )  # fmt: skip
    return export_random(folder, config)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are computed in this process instead of on Ray actors."""
    from pipelines.embedding import run
    from pipelines.embedding.parts import PartWorker

    def run_parts(todo: Any, plan: Any, weights: bytes, actors: Any) -> Iterator[Any]:
        worker = PartWorker(plan, weights)
        return (worker({"number": number}) for number in todo)

    monkeypatch.setattr("pipelines.cluster.ray_session", lambda compute: contextlib.nullcontext())
    monkeypatch.setattr(run, "run_parts", run_parts)
