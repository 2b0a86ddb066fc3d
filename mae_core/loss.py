"""Prediction targets and reconstruction loss (section 3, "Reconstruction target")."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mae_core.basis import PatchBasis
from mae_core.masking import Mask
from mae_core.patches import gather_patches

NORM_EPS = 1e-6


def targets(
    images: Float[Tensor, "batch channels height width"],
    mask: Mask,
    patch_px: int,
    kind: Literal["norm_pixels", "pixels", "pca"],
    basis: PatchBasis | None = None,
) -> Float[Tensor, "batch predicted dim"]:
    """Collect the values to predict (Table 1d).

    For norm_pixels, normalize each patch by its own mean and deviation; for pca, take its coefficients in `basis`.
    """
    pixels = gather_patches(images, mask.predicted_ids, patch_px)
    if kind == "pca":
        assert basis is not None, "target pca has a basis"
        return basis(pixels)
    return pixels if kind == "pixels" else normalize(pixels)


def normalize(pixels: Float[Tensor, "batch num dim"]) -> Float[Tensor, "batch num dim"]:
    """Normalize each patch to mean 0 and (unbiased) variance 1."""
    mean = pixels.mean(dim=-1, keepdim=True)
    deviation = (pixels.var(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    return (pixels - mean) / deviation


def masked_mse(
    pred: Float[Tensor, "batch predicted dim"], target: Float[Tensor, "batch predicted dim"]
) -> Float[Tensor, "batch"]:
    """Compute each sample's mean squared error over its predicted patches, in the target's precision."""
    return (pred.to(target.dtype) - target).square().mean(dim=(1, 2))
