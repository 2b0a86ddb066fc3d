"""Names of the reference implementation of MAE (github.com/facebookresearch/mae).

Its encoders and classifiers are timm's, so their names are. The decoder's tensors stand beside the encoder's, with
`decoder_` before them. The head of a linear probe is a BatchNorm without affine parameters and a linear layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mae_core.formats.ours import kind_of, refuse_mask_token_in_encoder

_BATCH_NORM_EPS = 1e-6


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the reference's tensors to ours. The BatchNorm of a linear probe is merged into its linear layer."""
    if "head.0.running_mean" in tensors:
        return _with_merged_head(tensors)
    if "decoder_embed.weight" not in tensors:
        return dict(tensors)
    return {_to_our_name(name): tensor for name, tensor in tensors.items()}


def from_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to the reference's. Raises UserError if mask tokens enter the encoder."""
    if kind_of(tensors) != "mae":
        return dict(tensors)
    refuse_mask_token_in_encoder(tensors, "the reference")
    return {_from_our_name(name): tensor for name, tensor in tensors.items()}


def _to_our_name(name: str) -> str:
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("decoder_"):
        return f"decoder.{name.removeprefix('decoder_')}"
    return f"encoder.{name}"


def _from_our_name(name: str) -> str:
    if name == "decoder.mask_token":
        return "mask_token"
    if name.startswith("decoder."):
        return f"decoder_{name.removeprefix('decoder.')}"
    return name.removeprefix("encoder.")


def _with_merged_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge normalization x -> (x - mean) / sqrt(var + eps) into the linear layer after it, in float64."""
    mean, var = tensors["head.0.running_mean"].double(), tensors["head.0.running_var"].double()
    weight = tensors["head.1.weight"].double() * torch.rsqrt(var + _BATCH_NORM_EPS)
    bias = tensors["head.1.bias"].double() - weight @ mean
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    return rest | {"head.weight": weight.float(), "head.bias": bias.float()}
