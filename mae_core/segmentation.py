"""A linear segmentation probe: each frozen patch token is classified on its own, and the logits are upsampled.

It follows DINOv2's linear evaluation (Oquab et al. 2023): BatchNorm, one linear layer, bilinear upsampling,
cross-entropy over the pixels that are not ignored. The BatchNorm has no affine parameters, as in MAE's linear probe.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mae_core.config import Size

IGNORE = 255
"""Index of pixels in a mask that belong to no class and count nowhere."""


class SegmentationHead(nn.Module):
    """BatchNorm without affine parameters and a linear layer on every patch token."""

    def __init__(self, width: int, num_classes: int, grid: Size) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Float[Tensor, "batch patches features"]) -> Float[Tensor, "batch classes rows columns"]:
        """Return the logits of every patch, on the grid of patches."""
        logits = self.head(self.norm(tokens.flatten(0, 1)))
        return logits.unflatten(0, (len(tokens), *self.grid)).permute(0, 3, 1, 2)


def upsample(
    logits: Float[Tensor, "batch classes rows columns"], size_px: Size
) -> Float[Tensor, "batch classes height width"]:
    """Interpolate logits bilinearly to the size of a mask."""
    return F.interpolate(logits, size=size_px, mode="bilinear", align_corners=False)


def segmentation_loss(
    logits: Float[Tensor, "batch classes rows columns"], masks: Int64[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Average the cross-entropy over all pixels of the masks that are not ignored; 0 if there are none."""
    total = F.cross_entropy(
        upsample(logits, (masks.shape[1], masks.shape[2])), masks, ignore_index=IGNORE, reduction="sum"
    )
    return total / (masks != IGNORE).sum().clamp(min=1)


def pixel_confusion(
    truth: Int64[Tensor, "*pixels"], predicted: Int64[Tensor, "*pixels"], num_classes: int
) -> Int64[Tensor, "classes classes"]:
    """Count pixels by true class (row) and predicted class (column), without the ignored ones."""
    counted = truth != IGNORE
    pairs = truth[counted] * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(confusion: Int64[Tensor, "classes classes"]) -> Float[Tensor, "classes"]:
    """Divide a class's correct pixels by those that are of it or predicted as it; nan for a class that masks lack."""
    correct, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    union = true + predicted - correct
    return torch.where(true > 0, correct / union.clamp(min=1), torch.nan)
