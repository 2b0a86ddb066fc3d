"""Views of training images as pure functions of a sample's key: an image is cropped and turned alike in any batch.

This module imports no torch, since the processes that decode images do not need it; `augment` has what follows on a
device.
"""

import random
from functools import lru_cache
from math import log
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32
from PIL import Image

from mae_core.config import AugmentConfig
from mae_core.randomness import Purpose, hash64_numpy, uniform_numpy

_NUM_ATTEMPTS = 10


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
