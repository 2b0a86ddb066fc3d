"""Start a masked autoencoder from the weights of another: take every tensor that fits, and name the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mae_core.config import ModelConfig, parse_arch
from mae_core.errors import UserError
from mae_core.model import MaskedAutoencoder
from mae_core.positions import resized

_PATCH_WEIGHT = "encoder.patch_embed.proj.weight"
_POSITIONS = ("encoder.pos_embed", "decoder.pos_embed")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of a model's tensors, by name."""

    taken: tuple[str, ...]
    """Tensors that have the values of the given weights."""
    adapted: tuple[str, ...]
    """Position tables that were resized, and a first layer that was converted to other channels."""
    initial: tuple[str, ...]
    """Tensors that keep their initial values, because the weights have none of that name and shape."""


@torch.no_grad()
def start_from(mae: MaskedAutoencoder, tensors: Mapping[str, Tensor], given: ModelConfig) -> Transfer:
    """Copy into `mae` what fits of the weights of a model with config `given`; return what was taken.

    `tensors` are those of a complete model, or of an encoder alone under timm's names. Position tables of another grid
    are resized (`positions.resized`), and the first layer is converted to other channels (`with_channels`). A decoder
    with fewer blocks takes the first ones. Raises UserError if the encoders differ in width or depth.
    """
    arch, given_arch = parse_arch(mae.config.arch), parse_arch(given.arch)
    if (arch.width, arch.depth) != (given_arch.width, given_arch.depth):
        raise UserError(
            f"model.arch is {arch.name}, but the weights are those of a {given_arch.name}, whose width or depth "
            f"differs; try --model.arch {given_arch.name}"
        )
    if not any(name.startswith("encoder.") for name in tensors):
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    taken, adapted, initial = [], [], []
    for name, own in mae.state_dict().items():
        found = tensors.get(name)
        has_same_tokens = arch.class_tokens == given_arch.class_tokens
        if found is not None and name in _POSITIONS and found.shape[-1] == own.shape[-1] and has_same_tokens:
            found = resized(found, given.grid, mae.config.grid, given_arch.class_tokens)
        if found is not None and name == _PATCH_WEIGHT and found.shape[2:] == own.shape[2:]:
            found = with_channels(found, own.shape[1])
        if found is None or found.shape != own.shape:
            initial.append(name)
            continue
        own.copy_(found)
        (taken if found is tensors[name] else adapted).append(name)
    return Transfer(taken=tuple(taken), adapted=tuple(adapted), initial=tuple(initial))


def with_channels(weight: Float[Tensor, "width old side side"], channels: int) -> Float[Tensor, "width new side side"]:
    """Convert the weight of a first layer to other channels.

    Every new channel gets the mean over the old ones, scaled by old / new: an image whose channels are equal has the
    same embedding before and after.
    """
    if weight.shape[1] == channels:
        return weight
    mean = weight.mean(1, keepdim=True) * (weight.shape[1] / channels)
    return mean.expand(-1, channels, -1, -1).contiguous()
