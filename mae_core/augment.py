"""Augmentations of batches, on any device, as pure functions of their samples' keys: alike in any batch, on any rank.

Crops, flips and turns of single images are in `views`.
"""

from functools import lru_cache
from math import log, pi

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from mae_core.config import AugmentConfig
from mae_core.normalization import Normalization
from mae_core.random_tensors import hash64, uniform
from mae_core.randomness import Purpose, seed_of

_NUM_ATTEMPTS = 10
# Random erasing's areas and aspects, as shares of the image (Zhong et al. 2017).
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_MIN_ASPECT = 0.3


def drop_bands(
    images: Float[Tensor, "crops channels height width"],
    prob: float,
    *,
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, "batch"],
) -> Float[Tensor, "crops channels height width"]:
    """Set channels of normalized images to 0, their mean, with probability `prob` each; one channel at least is kept.

    Rows run over the samples, then over their crops; each crop drops channels of its own.
    """
    if prob == 0:
        return images
    num_crops, channels = len(images) // len(sample_ids), images.shape[1]
    views = torch.arange(num_crops, device=images.device)[:, None, None]
    numbers = torch.arange(channels, device=images.device)
    drawn = uniform(seed, Purpose.BANDS, epoch, sample_ids[None, :, None], views, numbers).reshape(-1, channels)
    kept = drawn >= prob
    kept |= drawn == drawn.amax(dim=1, keepdim=True)
    return images * kept[:, :, None, None].to(images.dtype)


def pixels_to_input(
    images: UInt8[Tensor, "batch height width channels"] | Float32[Tensor, "batch height width channels"],
    normalization: Normalization,
) -> Float[Tensor, "batch channels height width"]:
    """Normalize pixels: (x / 255 - mean) / std in float32, channels first; float32 images are from 0 to 1 already.

    The memory stays in the order of `images`, which is torch's channels-last format.
    """
    scale, shift = _scale_and_shift(normalization, images.device, 255 if images.dtype == torch.uint8 else 1)
    # Always a copy: `images` may not be written to.
    return images.permute(0, 3, 1, 2).to(torch.float32, copy=True).mul_(scale).add_(shift)


def input_to_pixels(
    inputs: Float[Tensor, "batch channels height width"], normalization: Normalization
) -> UInt8[Tensor, "batch height width channels"]:
    """Undo `pixels_to_input`, rounding to the nearest of the 256 values and clipping what lies outside."""
    mean = torch.tensor(normalization.mean, device=inputs.device)[:, None, None]
    std = torch.tensor(normalization.std, device=inputs.device)[:, None, None]
    scaled = (inputs.float() * std + mean).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1)


@lru_cache(maxsize=64)
def _scale_and_shift(normalization: Normalization, device: torch.device, largest: int) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(normalization.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(normalization.std, dtype=torch.float64)[:, None, None]
    return (1 / (largest * std)).float().to(device), (-mean / std).float().to(device)


def erase(
    images: Float[Tensor, "batch channels height width"],
    prob: float,
    *,
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, "batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Fill a box with normal noise in a share `prob` of the images (random erasing, Zhong et al. 2017)."""
    if prob == 0:
        return images
    height, width = images.shape[-2:]
    ids, attempts = sample_ids[:, None], torch.arange(_NUM_ATTEMPTS, device=images.device)

    def draw(what: int) -> Tensor:
        return uniform(seed, Purpose.ERASE, epoch, ids, attempts, what)

    area = (_ERASE_AREA[0] + draw(0) * (_ERASE_AREA[1] - _ERASE_AREA[0])) * height * width
    aspect = ((1 - 2 * draw(1)) * log(_ERASE_MIN_ASPECT)).exp()
    box_height, box_width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_height < height) & (box_width < width)
    top = (draw(2) * (height - box_height + 1)).floor()
    left = (draw(3) * (width - box_width + 1)).floor()
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    boxes = [value.gather(1, first)[..., None] for value in (top, left, box_height, box_width)]
    inside = _inside(boxes, height, width)
    erased = (uniform(seed, Purpose.ERASE, epoch, sample_ids) < prob) & fits.any(dim=1)
    noise = _normal(images.shape, seed, epoch, sample_ids).to(images.dtype)
    return torch.where((inside & erased[:, None, None])[:, None], noise, images)


def _inside(boxes: list[Tensor], height: int, width: int) -> Tensor:
    """Mark the pixels inside each image's box, [batch, height, width]; a box is four [batch, 1, 1] tensors."""
    top, left, box_height, box_width = boxes
    row = torch.arange(height, device=top.device)[:, None]
    column = torch.arange(width, device=top.device)
    return (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)


def _normal(shape: torch.Size, seed: int, epoch: int, sample_ids: Tensor) -> Tensor:
    """Draw keyed standard normal numbers [batch, ...]: the Box-Muller transform of the two halves of a 64-bit hash."""
    pixels = torch.arange(shape[1:].numel(), device=sample_ids.device)
    bits = hash64(seed, Purpose.ERASE, epoch, sample_ids[:, None], _NUM_ATTEMPTS, pixels)
    radius = (((bits & 0xFFFFFFFF).float() + 1) * 2.0**-32).log().mul(-2).sqrt()
    return (radius * ((bits >> 32).float() * (2 * pi * 2.0**-32)).cos()).reshape(shape)


def soft_targets(labels: Int64[Tensor, "batch"], num_classes: int, smoothing: float) -> Float[Tensor, "batch classes"]:
    """Turn labels into one-hot targets with `smoothing` of the mass spread over all classes; label -1 becomes 0."""
    rest = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), rest, device=labels.device)
    return targets.scatter_(1, labels.clamp(min=0)[:, None], 1 - smoothing + rest)


def mixup(
    images: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, "batch"],
    num_classes: int,
    config: AugmentConfig,
    *,
    seed: int,
    step: int,
    micro: int,
    targets: Float[Tensor, "batch classes"] | None = None,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
    """Mix image i with image n - 1 - i of the micro-batch by mixup or CutMix, and their targets by the same share.

    Method and share are drawn once per micro-batch, keyed by (seed, step, micro); if both methods are enabled, each
    has probability one half. A sample whose partner is a placeholder (label -1) stays unmixed. Without `targets` they
    are those of the labels, smoothed.
    """
    if targets is None:
        targets = soft_targets(labels, num_classes, config.label_smoothing)
    if config.mixup == config.cutmix == 0:
        return images, targets
    rng = np.random.default_rng(seed_of(seed, Purpose.MIXUP, step, micro))
    cuts = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share = rng.beta(alpha, alpha)
    partner = torch.arange(len(labels), device=labels.device)
    partner = torch.where(labels.flip(0) < 0, partner, partner.flip(0))
    if cuts:
        top, left, bottom, right = _cut(rng, share, *images.shape[-2:])
        share = 1 - (bottom - top) * (right - left) / images.shape[-2:].numel()
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    else:
        mixed = images.lerp(images[partner], 1 - share)
    return mixed, targets.lerp(targets[partner], 1 - share)


def _cut(rng: np.random.Generator, share: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box (top, left, bottom, right) with 1 - share of the area and a random centre, clipped to the image."""
    half_height, half_width = height * (1 - share) ** 0.5 / 2, width * (1 - share) ** 0.5 / 2
    row, column = rng.integers(height), rng.integers(width)
    top, bottom = max(0, round(row - half_height)), min(height, round(row + half_height))
    left, right = max(0, round(column - half_width)), min(width, round(column + half_width))
    return int(top), int(left), int(bottom), int(right)
