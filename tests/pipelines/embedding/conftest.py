"""An exported backbone with random weights for images of 8 x 8 px, and commands that run without Ray."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mae_core.config import MaskConfig, ModelConfig
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from mae_core.normalization import Normalization


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a backbone that takes 8 x 8 px in colour. Tests must not write to the folder."""
    folder = tmp_path_factory.mktemp("backbone")
    config = ModelConfig(
        arch="vit_pico_patch4", image_px=(8, 8), mask=MaskConfig(ratio=0.5), decoder_depth=1, decoder_width=16,
        decoder_heads=2,
    )  # fmt: skip
    mae = build_mae(config, seed=0)
    pixels = asdict(Normalization(mean=(0.4,) * 3, std=(0.3,) * 3))
    (folder / "config.json").write_text(json.dumps({"kind": "backbone", "model": asdict(config), "pixels": pixels}))
    save_file(
        {name: tensor.contiguous() for name, tensor in export_tensors(mae.encoder).items()},
        folder / "encoder.safetensors",
    )
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in mae.state_dict().items()}, folder / "mae.safetensors"
    )
    return folder


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
