"""What tensors do not say about their model, read from the files and values that came with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mae_core.config import Size
from mae_core.errors import UserError
from mae_core.normalization import Normalization

_TRANSFORMERS_EPS = 1e-12
"""Epsilon of layer norms in transformers' ViT and ViTMAE if their config.json does not give one."""
_MODEL_TYPES = ("vit", "vit_mae")


@dataclass(frozen=True, kw_only=True)
class Hints:
    """From a config that came with the tensors, or from the user. None where nobody said it."""

    image_px: Size | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    norm_eps: float | None = None
    target: Literal["norm_pixels", "pixels"] | None = None
    mask_ratio: float | None = None
    pool: Literal["token", "avg"] | None = None
    classes: tuple[str, ...] = ()


def from_transformers(config: Mapping[str, Any]) -> Hints:
    """Read transformers' config.json. Raises UserError for a model other than ViT and ViTMAE, or another activation."""
    kind, activation = config.get("model_type"), config.get("hidden_act", "gelu")
    if kind not in _MODEL_TYPES:
        raise UserError(f"config.json describes a {kind!r} model of transformers; give a ViTMAE or a ViT")
    if activation != "gelu":
        raise UserError(f"the model's activation is {activation!r}; only gelu is supported")
    size, is_mae = config.get("image_size", 224), kind == "vit_mae"
    height_px, width_px = size if isinstance(size, list | tuple) else (size, size)
    labels = {int(number): str(label) for number, label in config.get("id2label", {}).items()}
    named = [labels[number] for number in sorted(labels)]
    are_numbers = all(label == f"LABEL_{number}" for number, label in enumerate(named))
    return Hints(
        image_px=(height_px, width_px),
        heads=config.get("num_attention_heads", 12),
        decoder_heads=config.get("decoder_num_attention_heads", 16) if is_mae else None,
        norm_eps=config.get("layer_norm_eps", _TRANSFORMERS_EPS),
        target=("norm_pixels" if config.get("norm_pix_loss") else "pixels") if is_mae else None,
        mask_ratio=config.get("mask_ratio") if is_mae else None,
        classes=() if are_numbers else tuple(named),
    )


def from_arguments(arguments: Mapping[str, Any]) -> Hints:
    """Read the arguments of the reference's training script, which its checkpoints hold."""
    normalizes, ratio = arguments.get("norm_pix_loss"), arguments.get("mask_ratio")
    return Hints(
        target=None if normalizes is None else "norm_pixels" if normalizes else "pixels",
        mask_ratio=float(ratio) if ratio is not None else None,
    )


def normalization_of(preprocessor: Mapping[str, Any]) -> Normalization | None:
    """Read transformers' preprocessor_config.json; None if it does not say."""
    if preprocessor.get("do_normalize") is False:
        return Normalization(mean=(0.0,), std=(1.0,))
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    return Normalization(mean=tuple(map(float, mean)), std=tuple(map(float, std))) if mean and std else None
