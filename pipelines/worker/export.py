"""Serialize a pretrained model for export and registration."""

import json

from mae_core.config import ModelConfig, Normalization
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from mae_core.state import pack, unpack
from pipelines.config import to_dict


def backbone_files(model: ModelConfig, pixels: Normalization, mae_tensors: bytes) -> dict[str, bytes]:
    """Return the files of an exported backbone by name.

    They are the encoder under timm's names, the complete model with its decoder, and the config of both.
    `mae_tensors` is the complete model as safetensors bytes.
    """
    mae = build_mae(model, seed=0)
    mae.load_state_dict(unpack(mae_tensors))
    config = {"kind": "backbone", "model": to_dict(model), "pixels": to_dict(pixels)}
    return {
        "encoder.safetensors": pack(export_tensors(mae.encoder)),
        "mae.safetensors": mae_tensors,
        "config.json": json.dumps(config, indent=1).encode(),
    }
