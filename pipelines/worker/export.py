"""Serialize a pretrained model or a classifier for export and registration."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mae_core.config import ClassifierConfig, ModelConfig, Size
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.state import pack, unpack
from pipelines.config import to_dict, without_added_defaults


def backbone_files(model: ModelConfig, pixels: Normalization, mae_tensors: bytes) -> dict[str, bytes]:
    """Return the files of an exported backbone by name.

    They are the encoder under timm's names, the complete model with its decoder, and the config of both.
    `mae_tensors` is the complete model as safetensors bytes.
    """
    mae = build_mae(model, seed=0)
    mae.load_state_dict(unpack(mae_tensors))
    return {**encoder_files(model, pixels, export_tensors(mae.encoder)), "mae.safetensors": mae_tensors}


def encoder_files(model: ModelConfig, pixels: Normalization, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a backbone without a decoder by name: its tensors under timm's names, and its config."""
    config = {"kind": "backbone", "model": to_dict(model), "pixels": without_added_defaults(pixels)}
    return {"encoder.safetensors": pack(tensors), "config.json": json.dumps(config, indent=1).encode()}


def classifier_files(
    tensors: Mapping[str, Tensor],
    config: ClassifierConfig,
    *,
    arch: str,
    image_px: Size,
    channels: int,
    classes: tuple[str, ...],
    norm_eps: float,
    pixels: Normalization,
    multi_label: bool = False,
) -> dict[str, bytes]:
    """Return the files of a classifier by name: its tensors under timm's names; classes and preprocessing.

    With `multi_label`, an image may have several classes, and probabilities do not sum to 1.
    """
    values: dict[str, Any] = {
        "kind": "classifier",
        "arch": arch,
        "image_px": list(image_px),
        "channels": channels,
        "classes": list(classes),
        "classifier": to_dict(config),
        "norm_eps": norm_eps,
        "pixels": without_added_defaults(pixels),
    }
    if multi_label:
        values["multi_label"] = True
    return {"classifier.safetensors": pack(tensors), "config.json": json.dumps(values, indent=1).encode()}
