"""What `prepare` stores of an image: its own bytes, the same JPEG cut into segments, or a smaller JPEG."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.decode import ImageHeader, Pixels, crop_resize, decode
from pipelines.jpeg import read_header
from pipelines.jpeg.restarts import with_restarts
from pipelines.jpeg.slice import find_segments

# Of the segments of a smaller JPEG, where one may choose: shorter ones leave less to decode beside a crop.
_TILE_PX = 48
_BLOCK_PX = 8


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An encoded image as the shards hold it. Height and width are those of the upright image."""

    content: bytes
    height_px: int
    width_px: int
    orientation: int
    segment_offsets: list[int] | None = None
    """Where each segment of a sliceable JPEG starts, and its length; None where there are none."""


def encode(content: bytes, header: ImageHeader, pixels: Pixels, config: EncodeConfig) -> StoredImage:
    """The image as the config wants it stored; `pixels` are the upright ones that `decode` made of `content`.

    Lossless kinds are decoded again and compared: where a pixel differed, the image stays as it was.
    """
    if config.kind == "shrink" and min(header.height_px, header.width_px) > config.short_side_px:
        return _shrunk(pixels, config)
    kept = StoredImage(
        content=content, height_px=header.height_px, width_px=header.width_px, orientation=header.orientation
    )
    if config.kind == "keep" or header.format != "JPEG":
        return kept
    found = with_restarts(content)
    if found is None or not np.array_equal(decode(found[0], pixels.shape[2], header.orientation), pixels):
        return kept
    return StoredImage(
        content=found[0],
        height_px=header.height_px,
        width_px=header.width_px,
        orientation=header.orientation,
        segment_offsets=found[1].tolist(),
    )


def _shrunk(pixels: Pixels, config: EncodeConfig) -> StoredImage:
    """A JPEG whose short side is as configured, upright, with restart markers."""
    height, width = pixels.shape[:2]
    scale = config.short_side_px / min(height, width)
    height_px, width_px = max(1, round(height * scale)), max(1, round(width * scale))
    small = crop_resize(pixels, (0, 0, height, width), False, (height_px, width_px))
    file = io.BytesIO()
    is_gray = pixels.shape[2] == 1
    image = Image.fromarray(small[:, :, 0] if is_gray else small)
    mcu_px = _BLOCK_PX if is_gray else 2 * _BLOCK_PX
    interval = _interval(-(-width_px // mcu_px), mcu_px)
    image.save(file, "JPEG", quality=config.quality, subsampling="4:2:0", restart_marker_blocks=interval)
    content = file.getvalue()
    offsets = find_segments(content, read_header(content))
    return StoredImage(
        content=content, height_px=height_px, width_px=width_px, orientation=1, segment_offsets=offsets.tolist()
    )


def _interval(mcus_per_row: int, mcu_px: int) -> int:
    """The fewest MCUs that divide a row and are _TILE_PX wide, or the row."""
    return min(
        k for k in range(1, mcus_per_row + 1) if mcus_per_row % k == 0 and (k * mcu_px >= _TILE_PX or k == mcus_per_row)
    )
