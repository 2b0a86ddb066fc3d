"""What is predicted, and how far off a prediction is (section 3, "Reconstruction target")."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mae_core.masking import Mask
from mae_core.patches import gather_patches

NORM_EPS = 1e-6


def targets(
    images: Float[Tensor, "batch channels height width"],
    mask: Mask,
    patch_px: int,
    kind: Literal["norm_pixels", "pixels"],
) -> Float[Tensor, "batch predicted dim"]:
    """The predicted patches' values; for norm_pixels normalised by each patch's own mean and deviation (Table 1d)."""
    pixels = gather_patches(images, mask.predicted_ids, patch_px)
    return pixels if kind == "pixels" else normalize(pixels)


def normalize(pixels: Float[Tensor, "batch num dim"]) -> Float[Tensor, "batch num dim"]:
    """Patches with mean 0 and variance 1 (unbiased), each by its own statistics."""
    mean = pixels.mean(dim=-1, keepdim=True)
    deviation = (pixels.var(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    return (pixels - mean) / deviation


def masked_mse(
    pred: Float[Tensor, "batch predicted dim"], target: Float[Tensor, "batch predicted dim"]
) -> Float[Tensor, "batch"]:
    """Each sample's mean squared error over its predicted patches, in the target's precision."""
    return (pred.to(target.dtype) - target).square().mean(dim=(1, 2))
