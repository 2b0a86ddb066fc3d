"""Exported backbones with random weights, as `mae pretrain` leaves them in export/ of a run."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from mae_core.config import ModelConfig
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from mae_core.normalization import Normalization


def export_random(folder: Path, config: ModelConfig) -> Path:
    """Write a backbone into an existing folder; return that."""
    mae = build_mae(config, seed=0)
    pixels = asdict(Normalization(mean=(0.4,) * config.channels, std=(0.3,) * config.channels))
    (folder / "config.json").write_text(json.dumps({"kind": "backbone", "model": asdict(config), "pixels": pixels}))
    save_file(
        {name: tensor.contiguous() for name, tensor in export_tensors(mae.encoder).items()},
        folder / "encoder.safetensors",
    )
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in mae.state_dict().items()}, folder / "mae.safetensors"
    )
    return folder
