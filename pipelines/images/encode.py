"""Encode an image for storage: its own bytes, the same JPEG with an index for partial decoding, or a smaller JPEG."""

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
    """An encoded image as stored in shards. Height and width are those of the upright image."""

    content: bytes
    height_px: int
    width_px: int
    orientation: int
    segment_offsets: list[int] | None = None
    """For partial decoding of a JPEG: byte offsets of its index's begin and end, or the offset of each segment and the
    length of the file. None if the image can only be decoded in full."""


def encode(content: bytes, header: ImageHeader, pixels: ImageArray, config: EncodeConfig) -> StoredImage:
    """Encode the image as configured; `pixels` are the upright pixels that `decode` returned for `content`.

    Lossless kinds are verified by decoding, in full and in part: if a pixel differs, the original bytes are stored.
    """
    if config.kind == "shrink" and min(header.height_px, header.width_px) > config.short_side_px:
        return _shrunk(pixels, config)
    kept = StoredImage(
        content=content, height_px=header.height_px, width_px=header.width_px, orientation=header.orientation
    )
    if config.kind != "keep" and not header.is_plain:
        return as_png(pixels)
    if config.kind == "keep" or header.format != "JPEG":
        return kept
    rewritten = _add_offsets(content, config)
    if rewritten is None:
        return kept
    stored = dataclasses.replace(kept, content=rewritten[0], segment_offsets=rewritten[1])
    return stored if _decodes_to(stored, pixels) else kept


def as_png(pixels: ImageArray) -> StoredImage:
    """Encode upright pixels of a format that the feed's decoder does not read, without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return StoredImage(content=file.getvalue(), height_px=pixels.shape[0], width_px=pixels.shape[1], orientation=1)


def _decodes_to(stored: StoredImage, pixels: ImageArray) -> bool:
    """Return whether the stored image decodes to these pixels, in full and around its centre alone."""
    channels, offsets = pixels.shape[2], np.array(stored.segment_offsets, np.int32)
    if not np.array_equal(decode(stored.content, channels, stored.orientation), pixels):
        return False
    top, left = stored.height_px // 4, stored.width_px // 4
    height, width = -(-stored.height_px // 2), -(-stored.width_px // 2)
    part, box = decode_crop(stored.content, channels, stored.orientation, offsets, (top, left, height, width))
    centre = part[box[0] : box[0] + height, box[1] : box[1] + width]
    return np.array_equal(centre, pixels[top : top + height, left : left + width])


def _add_offsets(content: bytes, config: EncodeConfig) -> tuple[bytes, list[int]] | None:
    """Rewrite the JPEG for partial decoding; return it with its offsets, or None if that is not possible."""
    # Both import numba, which takes half a second.
    from pipelines.images.jpeg.index import with_index
    from pipelines.images.jpeg.restarts import with_restarts

    _compile_crops()
    rewritten = with_restarts(content) if config.kind == "restarts" else with_index(content)
    return None if rewritten is None else (rewritten[0], list(map(int, rewritten[1])))


@cache
def _compile_crops() -> None:
    """Compile the crop kernel into this machine's cache, so that training need not wait for it at its first batch."""
    from pipelines.images.crops import crop_into

    pixels = np.zeros((1, 1, 3), np.uint8)
    crop_into(pixels, pixels.copy(), (0, 0, 1, 1), False, Scratch())


def _shrunk(pixels: ImageArray, config: EncodeConfig) -> StoredImage:
    """Encode an upright JPEG with an index, whose short side has the configured size."""
    from pipelines.images.crops import crop_into

    height, width = pixels.shape[:2]
    scale = config.short_side_px / min(height, width)
    height_px, width_px = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.empty((height_px, width_px, pixels.shape[2]), np.uint8)
    crop_into(small, pixels, (0, 0, height, width), False, Scratch())
    file = io.BytesIO()
    image = Image.fromarray(small[:, :, 0] if pixels.shape[2] == 1 else small)
    image.save(file, "JPEG", quality=config.quality, subsampling="4:2:0")
    content, offsets = _add_offsets(file.getvalue(), config) or (file.getvalue(), None)
    return StoredImage(content=content, height_px=height_px, width_px=width_px, orientation=1, segment_offsets=offsets)
