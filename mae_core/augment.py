"""Training augmentations as pure functions of a sample's key: an image is augmented alike in any batch, on any rank."""

import random
from functools import lru_cache
from math import log, pi
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64, UInt8
from PIL import Image
from torch import Tensor

from mae_core.config import AugmentConfig
from mae_core.normalization import Normalization
from mae_core.random_tensors import hash64, uniform
from mae_core.randomness import Purpose, hash64_numpy, seed_of, uniform_numpy

_NUM_ATTEMPTS = 10
# Random erasing's areas and aspects, as shares of the image (Zhong et al. 2017).
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_MIN_ASPECT = 0.3


def crop_boxes(
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    sample_ids: Int[np.ndarray, "n"],
    heights_px: Int[np.ndarray, "n"],
    widths_px: Int[np.ndarray, "n"],
    view: int = 0,
) -> Int32[np.ndarray, "n 4"]:
    """Draw a box (top, left, height, width) in pixels per image, distributed as torchvision's RandomResizedCrop.

    Take the first of ten keyed attempts that fits; if none does, take the largest centred box within the aspect-ratio
    range. With crop "none" the box is the entire image.
    """
    height, width = heights_px.astype(np.int64), widths_px.astype(np.int64)
    if config.crop == "none":
        return np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1).astype(np.int32)
    attempts = np.arange(_NUM_ATTEMPTS)

    def draw(what: int) -> np.ndarray:
        return uniform_numpy(seed, Purpose.CROP, epoch, sample_ids[:, None], view, attempts, what)

    area = (height * width)[:, None] * (config.scale[0] + draw(0) * (config.scale[1] - config.scale[0]))
    low, high = log(config.aspect[0]), log(config.aspect[1])
    aspect = np.exp(low + draw(1) * (high - low))
    box_width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    box_height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (box_width >= 1) & (box_width <= width[:, None]) & (box_height >= 1) & (box_height <= height[:, None])
    top = (draw(2) * (height[:, None] - box_height + 1)).astype(np.int64)
    left = (draw(3) * (width[:, None] - box_width + 1)).astype(np.int64)
    first = fits.argmax(axis=1)
    attempted = np.stack([top, left, box_height, box_width], axis=2)[np.arange(len(first)), first]
    any_fits = np.take_along_axis(fits, first[:, None], axis=1)
    return np.where(any_fits, attempted, _central_boxes(config, height, width)).astype(np.int32)


def _central_boxes(config: AugmentConfig, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    aspect = width / height
    box_width = np.where(aspect > config.aspect[1], np.rint(height * config.aspect[1]), width).astype(np.int64)
    box_height = np.where(aspect < config.aspect[0], np.rint(width / config.aspect[0]), height).astype(np.int64)
    return np.stack([(height - box_height) // 2, (width - box_width) // 2, box_height, box_width], axis=1)


def flips(
    config: AugmentConfig, *, seed: int, epoch: int, sample_ids: Int[np.ndarray, "n"], view: int = 0
) -> Bool[np.ndarray, "n"]:
    """Decide which images to mirror left to right."""
    bits = hash64_numpy(seed, Purpose.FLIP, epoch, sample_ids, view) >> np.uint64(63)
    return bits.astype(bool) & config.flip


def turns(
    config: AugmentConfig, *, seed: int, epoch: int, sample_ids: Int[np.ndarray, "n"], view: int = 0
) -> tuple[Bool[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Decide which images to mirror top to bottom, and how many quarter turns each then gets."""
    bits = hash64_numpy(seed, Purpose.TURN, epoch, sample_ids, view)
    quarters = (bits >> np.uint64(62)).astype(np.int64) * config.quarter_turns
    return (bits >> np.uint64(61) & np.uint64(1)).astype(bool) & config.flip_vertical, quarters


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


def rand_augment(image: Image.Image, recipe: str, seed_key: int) -> Image.Image:
    """Apply timm's RandAugment and return an image of the same mode.

    `seed_key` is the sample's `seed_of(seed, Purpose.AUGMENT, epoch, sample_id, view)`. Python's and numpy's global
    generators, which timm draws from, are seeded with it and restored.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed_key)
    np.random.seed(seed_key % 2**32)
    try:
        return _rand_augment_transform(recipe, min(image.size))(image.convert("RGB")).convert(image.mode)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@lru_cache(maxsize=64)
def _rand_augment_transform(recipe: str, side_px: int) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    # As timm's own training transform: shifts up to 45 % of the side, bicubic interpolation.
    hparams = {"translate_const": int(side_px * 0.45), "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(recipe, {**hparams, "img_mean": (128, 128, 128)})


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
