"""A backbone as a run exports it, with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_core.config import parse_arch
from mae_core.encoder import build_encoder, export_tensors


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a gray ViT-pico for 28 px."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    vit = build_encoder(parse_arch("vit_pico_patch4"), (28, 28), 1)
    save_file(
        {name: tensor.contiguous() for name, tensor in export_tensors(vit).items()}, folder / "encoder.safetensors"
    )
    model = {"arch": "vit_pico_patch4", "image_px": [28, 28], "channels": 1}
    config = {"kind": "backbone", "model": model, "pixels": {"mean": [0.3], "std": [0.35]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
