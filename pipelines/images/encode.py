"""What `prepare` stores of an image: its own bytes, the same JPEG so that parts can be decoded, or a smaller JPEG."""

import dataclasses
import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.images.decode import ImageArray, ImageHeader, Scratch, decode
from pipelines.images.jpeg.partial_decode import decode_crop


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An encoded image as the shards hold it. Height and width are those of the upright image."""

    content: bytes
    height_px: int
    width_px: int
    orientation: int
    segment_offsets: list[int] | None = None
    """Of a JPEG that can be sliced: where its index begins and ends, or where each of its segments starts, and its
    length; None for others."""


def encode(content: bytes, header: ImageHeader, pixels: ImageArray, config: EncodeConfig) -> StoredImage:
    """The image as the config wants it stored; `pixels` are the upright ones that `decode` made of `content`.

    Lossless kinds are decoded again, whole and in part: where a pixel differed, the image stays as it was.
    """
    if config.kind == "shrink" and min(header.height_px, header.width_px) > config.short_side_px:
        return _shrunk(pixels, config)
    kept = StoredImage(
        content=content, height_px=header.height_px, width_px=header.width_px, orientation=header.orientation
    )
    if config.kind == "keep" or header.format != "JPEG":
        return kept
    found = _sliceable(content, config)
    if found is None:
        return kept
    stored = dataclasses.replace(kept, content=found[0], segment_offsets=found[1])
    return stored if _holds(stored, pixels) else kept


def _holds(stored: StoredImage, pixels: ImageArray) -> bool:
    """Whether these are the pixels of the stored image, decoded whole, and of its middle, decoded alone."""
    channels, offsets = pixels.shape[2], np.array(stored.segment_offsets, np.int32)
    if not np.array_equal(decode(stored.content, channels, stored.orientation), pixels):
        return False
    top, left = stored.height_px // 4, stored.width_px // 4
    height, width = -(-stored.height_px // 2), -(-stored.width_px // 2)
    found, within = decode_crop(stored.content, channels, stored.orientation, offsets, (top, left, height, width))
    part = found[within[0] : within[0] + height, within[1] : within[1] + width]
    return np.array_equal(part, pixels[top : top + height, left : left + width])


def _sliceable(content: bytes, config: EncodeConfig) -> tuple[bytes, list[int]] | None:
    """The same JPEG with what slicing needs, and its offsets."""
    # Both need a compiler, which takes half a second to load.
    from pipelines.images.jpeg.index import with_index
    from pipelines.images.jpeg.restarts import with_restarts

    _compile_crops()
    found = with_restarts(content) if config.kind == "restarts" else with_index(content)
    return None if found is None else (found[0], list(map(int, found[1])))


@cache
def _compile_crops() -> None:
    """Training, whose first batch is waited for, finds compiled on this machine what it crops with."""
    from pipelines.images.crops import crop_into

    pixels = np.zeros((1, 1, 3), np.uint8)
    crop_into(pixels, pixels.copy(), (0, 0, 1, 1), False, Scratch())


def _shrunk(pixels: ImageArray, config: EncodeConfig) -> StoredImage:
    """A JPEG whose short side is as configured, upright, with an index."""
    from pipelines.images.crops import crop_into

    height, width = pixels.shape[:2]
    scale = config.short_side_px / min(height, width)
    height_px, width_px = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.empty((height_px, width_px, pixels.shape[2]), np.uint8)
    crop_into(small, pixels, (0, 0, height, width), False, Scratch())
    file = io.BytesIO()
    image = Image.fromarray(small[:, :, 0] if pixels.shape[2] == 1 else small)
    image.save(file, "JPEG", quality=config.quality, subsampling="4:2:0")
    content, offsets = _sliceable(file.getvalue(), config) or (file.getvalue(), None)
    return StoredImage(content=content, height_px=height_px, width_px=width_px, orientation=1, segment_offsets=offsets)
