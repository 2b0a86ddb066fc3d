"""Losses of one micro-batch, as sums and not means (the caller divides by the samples of the step), and the EMA."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.masking import Mask


def pretrain_loss(
    mae: nn.Module,
    images: Float[Tensor, "crops channels height width"],
    mask: Mask,
    weights: Float[Tensor, "batch"],
    seen: Float[Tensor, "crops channels height width"] | None = None,
) -> Float[Tensor, ""]:
    """Sum the samples' losses, weighted; placeholders have weight 0.

    Rows of images and masks are ordered by crop or view first, then by sample. If there are more masks
    (`training_masks`) than images, images are repeated; a sample's loss is the mean over its views. `seen` are the
    images as the encoder sees them, if they differ from those to predict.
    """
    views = len(mask.visible_ids) // len(weights)
    shown = () if seen is None else (seen,)
    if views == 1:
        return (mae(images, mask, *shown) * weights).sum()
    repeats = len(mask.visible_ids) // len(images)
    shown = tuple(some.repeat(repeats, 1, 1, 1) for some in shown)
    losses = mae(images.repeat(repeats, 1, 1, 1), mask, *shown).unflatten(0, (views, -1))
    return (losses.mean(dim=0) * weights).sum()


def classify_loss(
    logits: Float[Tensor, "batch classes"],
    targets: Float[Tensor, "batch classes"],
    weights: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Sum the samples' cross-entropies with soft targets, weighted; placeholders have weight 0."""
    return -((targets * F.log_softmax(logits, dim=1)).sum(dim=1) * weights).sum()


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every parameter of `ema` by 1 - decay towards the model's; copy the model's buffers."""
    averages: list[Tensor] = list(ema.parameters())
    values: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)
