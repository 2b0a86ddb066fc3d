"""Decoding rate per core: the usual loaders against ours on what `prepare` stores, interleaved."""

import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from mae_core.config import AugmentConfig
from mae_core.views import crop_boxes, flips
from pipelines.config import EncodeConfig
from pipelines.images.crops import crop_into
from pipelines.images.decode import Box, ImageArray, Scratch, decode, inspect
from pipelines.images.encode import StoredImage, encode
from pipelines.images.jpeg.partial_decode import Offsets, decode_crop

_OUT_PX = (224, 224)
_SCALE = (0.2, 1.0)
_KINDS = {
    "full": EncodeConfig(kind="keep"),
    "restarts": EncodeConfig(kind="restarts"),
    "sliced": EncodeConfig(),
    "shrunk": EncodeConfig(kind="shrink"),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One loader of the same images."""

    title: str
    run: Callable[[int], Any]
    """Decode and crop every image once; takes the number of the round, which decides the crops."""
    num_bytes: int
    """Size of all encoded images."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of our pixel values, 0 to 255, from Pillow's on the same crops."""

    psnr_db: float
    mean: float
    maximum: int


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Measured times of all variants."""

    variants: dict[str, Variant]
    num_images: int
    seconds: dict[str, list[float]]
    """CPU seconds per round, by variant."""
    difference: Difference
    prepare_ms: dict[str, float]
    """CPU milliseconds per image that preparing takes beyond decoding, by kind of encoding."""

    def images_per_s(self, name: str) -> float:
        return self.num_images / median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Return the range of the times over rounds, as a share of the median."""
        return (max(self.seconds[name]) - min(self.seconds[name])) / median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the speed relative to another variant: the median of the rounds' ratios."""
        return median(b / a for a, b in zip(self.seconds[name], self.seconds[other]))

    def bytes_ratio(self, name: str) -> float:
        return self.variants[name].num_bytes / self.variants["full"].num_bytes

    def figures(self) -> dict[str, Any]:
        return {
            "images_per_s_per_core": self.images_per_s("sliced"),
            "ratio_vs_pil": self.ratio("sliced", "pil"),
            "ratio_vs_torchvision_io": self.ratio("sliced", "torchvision_io"),
            "psnr_db": self.difference.psnr_db,
            "mean_difference": self.difference.mean,
            "max_difference": self.difference.maximum,
            "prepare_ms": self.prepare_ms["sliced"],
            "prepare_restarts_ms": self.prepare_ms["restarts"],
            "contenders": {
                name: {
                    "images_per_s_per_core": self.images_per_s(name),
                    "spread": self.spread(name),
                    "bytes_ratio": self.bytes_ratio(name),
                }
                for name in self.variants
            },
        }


def measure_decoding(images: Sequence[bytes], rounds: int) -> Decoding:
    """Time every variant once per round on one thread, after a warm-up; each round starts with another variant."""
    stored, prepare_ms = _prepared(images)
    variants = _variants(images, stored)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for variant in variants.values():
            variant.run(0)
        for number in range(rounds):
            names = list(variants)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                started = time.process_time()
                variants[name].run(number)
                seconds[name].append(time.process_time() - started)
    finally:
        torch.set_num_threads(num_threads)
    return Decoding(
        variants=variants,
        num_images=len(images),
        seconds=seconds,
        difference=_difference(images, stored["sliced"]),
        prepare_ms=prepare_ms,
    )


def _prepared(images: Sequence[bytes]) -> tuple[dict[str, list[StoredImage]], dict[str, float]]:
    """Encode the images in every kind as `prepare` does; return them, and the CPU milliseconds per image."""
    found: dict[str, list[StoredImage]] = {name: [] for name in _KINDS}
    spent_s = dict.fromkeys(_KINDS, 0.0)
    for number, content in enumerate([images[0], *images]):
        header = inspect(content)
        pixels = decode(content, header.channels, header.orientation)
        for name, config in _KINDS.items():
            started = time.process_time()
            stored = encode(content, header, pixels, config)
            if number == 0:  # The first image comes twice: compiling and loading must not count.
                continue
            found[name].append(stored)
            spent_s[name] += time.process_time() - started
    return found, {name: 1000 * seconds / len(images) for name, seconds in spent_s.items()}


def _variants(images: Sequence[bytes], stored: dict[str, list[StoredImage]]) -> dict[str, Variant]:
    num_bytes = sum(map(len, images))
    titles = {
        "full": "ours, the original bytes",
        "restarts": "ours, restart markers",
        "sliced": "ours, indexed (default)",
        "shrunk": f"ours, shrunk to {_KINDS['shrunk'].short_side_px} px (lossy)",
    }
    return {
        "pil": Variant(title="torchvision transforms on PIL", run=_pil(images), num_bytes=num_bytes),
        "torchvision_io": Variant(title="torchvision.io + v2", run=_torchvision_io(images), num_bytes=num_bytes),
        **{
            name: Variant(
                title=title,
                run=partial(_ours, stored[name], _offsets(stored[name])),
                num_bytes=sum(len(s.content) for s in stored[name]),
            )
            for name, title in titles.items()
        },
    }


def _pil(images: Sequence[bytes]) -> Callable[[int], Any]:
    """Build the transforms of the reference implementation, up to the uint8 tensor."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(_OUT_PX, scale=_SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )

    def run(number: int) -> None:
        torch.manual_seed(number)
        for content in images:
            transform(Image.open(io.BytesIO(content)).convert("RGB"))

    return run


def _torchvision_io(images: Sequence[bytes]) -> Callable[[int], Any]:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(_OUT_PX, scale=_SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in images]

    def run(number: int) -> None:
        torch.manual_seed(number)
        # torchvision 0.29 warns at each call that torchcodec will replace it.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            for tensor in tensors:
                transform(decode_image(tensor, mode=ImageReadMode.RGB))

    return run


def _ours(stored: Sequence[StoredImage], offsets: Sequence[Offsets], number: int) -> None:
    """Decode every image as training does: partial decode under a random crop, resized into an array."""
    out, scratch = np.empty((*_OUT_PX, 3), np.uint8), Scratch()
    boxes, mirrored = _draw_crops(stored, number)
    for image, found, box, flip in zip(stored, offsets, boxes, mirrored):
        _decode_into(out, image, found, box, flip, scratch)


def _offsets(stored: Sequence[StoredImage]) -> list[Offsets]:
    """Return each image's JPEG index as a data task gets it from a shard; made before timing, since it costs a copy."""
    return [np.array(image.segment_offsets or [], np.int32) for image in stored]


def _draw_crops(stored: Sequence[StoredImage], epoch: int) -> tuple[list[Box], list[bool]]:
    """Draw the crop and the flip of every image, a pure function of epoch and position."""
    config, ids = AugmentConfig(scale=_SCALE), np.arange(len(stored))
    heights, widths = (np.array([getattr(image, name) for image in stored]) for name in ("height_px", "width_px"))
    boxes = crop_boxes(config, seed=0, epoch=epoch, sample_ids=ids, heights_px=heights, widths_px=widths)
    return list(map(tuple, boxes.tolist())), flips(config, seed=0, epoch=epoch, sample_ids=ids).tolist()


def _decode_into(out: ImageArray, image: StoredImage, offsets: Offsets, box: Box, flip: bool, scratch: Scratch) -> None:
    pixels, within = decode_crop(image.content, 3, image.orientation, offsets, box, scratch)
    crop_into(out, pixels, within, flip, scratch)


def _difference(images: Sequence[bytes], stored: Sequence[StoredImage]) -> Difference:
    """Compare all images with Pillow's on the crops of round 0, without the flip, after EXIF rotation."""
    from PIL import ImageOps

    boxes, _ = _draw_crops(stored, 0)
    found, scratch = np.empty((*_OUT_PX, 3), np.uint8), Scratch()
    squares = total = maximum = count = 0
    for content, image, offsets, box in zip(images, stored, _offsets(stored), boxes):
        top, left, height, width = box
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        picture = picture.crop((left, top, left + width, top + height)).resize(
            (_OUT_PX[1], _OUT_PX[0]), Image.Resampling.BICUBIC
        )
        _decode_into(found, image, offsets, box, False, scratch)
        steps = np.abs(found.astype(np.int64) - np.asarray(picture))
        squares, total = squares + int((steps**2).sum()), total + int(steps.sum())
        maximum, count = max(maximum, int(steps.max())), count + steps.size
    mean_square = max(squares, 1) / count
    return Difference(psnr_db=10 * float(np.log10(255**2 / mean_square)), mean=total / count, maximum=maximum)
