"""What tensors under our names are: an encoder, a classifier, or a complete MAE."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mae_core.errors import UserError

Kind = Literal["encoder", "mae", "classifier"]
_BLOCK = re.compile(r"(?P<stack>.*blocks)\.(?P<index>\d+)\.(?P<rest>.+)")


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """Return what the tensors are, from their names."""
    if any(name.startswith("decoder.") for name in tensors):
        return "mae"
    return "classifier" if "head.weight" in tensors else "encoder"


def encoder_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder of a complete MAE under timm's names, without its decoder; an encoder is unchanged."""
    if kind_of(tensors) != "mae":
        return dict(tensors)
    return {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}


def split_block(name: str) -> tuple[str, int, str] | None:
    """Split `encoder.blocks.3.norm1.weight` into stack, index and rest; None for a name outside the blocks."""
    found = _BLOCK.fullmatch(name)
    return (found["stack"], int(found["index"]), found["rest"]) if found else None


def with_qkv_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add zero biases where attention has none, which computes the same."""
    full = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("attn.qkv.weight"):
            full.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros_like(weight[:, 0]))
    return full


def refuse_mask_token_in_encoder(tensors: Mapping[str, Tensor], naming: str) -> None:
    """Raise UserError if mask tokens enter the encoder: no other project has such a model."""
    if "mask_token" in tensors:
        raise UserError(
            f"mask tokens enter this model's encoder (mask_token_in encoder), which {naming} has no names for; "
            "export its encoder alone"
        )
