"""Draw reconstructions in the style of the paper's Figures 2 and 3: masked, predicted, original."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mae_core.errors import UserError
from pipelines.images.decode import ImageArray

Triple = tuple[ImageArray, ImageArray, ImageArray]

COLUMNS = ("masked", "reconstruction", "original")
_WIDTH_PX = 1500
_SMALLEST_SIDE_PX, _LARGEST_SIDE_PX = 112, 224
_GAP_PX, _TRIPLE_GAP_PX, _MARGIN_PX = 4, 20, 28
_TITLE_PX, _COLUMN_PX, _BLOCK_GAP_PX = 26, 17, 34
_INK, _GRAY = (20, 20, 20), (95, 95, 95)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Triples that share a title, such as those of one mask ratio."""

    title: str
    rows: Sequence[Triple]
    """(masked, reconstruction, original) per image: uint8 [height width channels], 1 or 3 channels, all of one size."""


def shown_pixels(pixels: NDArray[Any], bands: Sequence[int] = ()) -> ImageArray:
    """Return pixels [... height width channels], uint8 or from 0 to 1, as uint8 in one or three channels for people.

    `bands` are the channels shown as red, green and blue; without them the first three, or the first one of two.
    """
    channels = pixels.shape[-1]
    chosen = list(bands) or list(range(3 if channels >= 3 else 1))
    shown = pixels if chosen == list(range(channels)) else pixels[..., chosen]
    if shown.dtype == np.uint8:
        return shown
    return (shown.clip(0, 1) * 255).round().astype(np.uint8)


def reconstruction_rows(blocks: Sequence[Block], path: Path) -> None:
    """Write an image file, PNG or as the suffix says: blocks below each other, triples side by side in rows.

    Small images are enlarged by integer factors without interpolation. Raises UserError if there is no image.
    """
    if not blocks or any(not block.rows for block in blocks):
        raise UserError("no image to show; try at least one image and one mask ratio")
    height_px, width_px = shown_size(blocks[0].rows[0][2])
    triple_px = 3 * width_px + 2 * _GAP_PX
    most = max(len(block.rows) for block in blocks)
    across = _triples_across(most, triple_px)
    page_px = 2 * _MARGIN_PX + across * triple_px + (across - 1) * _TRIPLE_GAP_PX
    heights_px = [_block_height(block, across, height_px) for block in blocks]
    page = Image.new("RGB", (page_px, 2 * _MARGIN_PX + sum(heights_px) + _BLOCK_GAP_PX * (len(blocks) - 1)), "white")
    top = _MARGIN_PX
    for block, block_px in zip(blocks, heights_px, strict=True):
        _draw_block(page, block, top, across, (height_px, width_px))
        top += block_px + _BLOCK_GAP_PX
    page.save(path)


def _draw_block(page: Image.Image, block: Block, top: int, across: int, size_px: tuple[int, int]) -> None:
    height_px, width_px = size_px
    draw = ImageDraw.Draw(page)
    draw.text(
        (_MARGIN_PX, top), block.title, fill=_INK, font=font_of(_TITLE_PX, page.width - 2 * _MARGIN_PX, block.title)
    )
    top += _header_px()
    for i, triple in enumerate(block.rows):
        row, column = divmod(i, across)
        y = top + row * (height_px + _GAP_PX)
        for j, (pixels, name) in enumerate(zip(triple, COLUMNS, strict=True)):
            x = _MARGIN_PX + column * (3 * width_px + 2 * _GAP_PX + _TRIPLE_GAP_PX) + j * (width_px + _GAP_PX)
            page.paste(enlarged(pixels, size_px), (x, y))
            if row == 0:
                font = font_of(_COLUMN_PX, width_px, "reconstruction")
                draw.text((x + width_px / 2, top - 6), name, fill=_GRAY, font=font, anchor="ms")


def _block_height(block: Block, across: int, height_px: int) -> int:
    num_rows = math.ceil(len(block.rows) / across)
    return _header_px() + num_rows * height_px + (num_rows - 1) * _GAP_PX


def _header_px() -> int:
    """Return the height of a block's title and column names."""
    return round(1.5 * _TITLE_PX) + round(1.5 * _COLUMN_PX)


def _triples_across(count: int, triple_px: int) -> int:
    """Return how many triples to place in a row: as many as fit, balanced so that rows differ little in length."""
    fitting = max(1, (_WIDTH_PX - 2 * _MARGIN_PX + _TRIPLE_GAP_PX) // (triple_px + _TRIPLE_GAP_PX))
    return math.ceil(count / math.ceil(count / fitting))


def shown_size(pixels: ImageArray) -> tuple[int, int]:
    """Return height and width on the page: small images are enlarged by an integer factor, large ones are reduced."""
    height_px, width_px = pixels.shape[:2]
    longest = max(height_px, width_px)
    factor: float = math.ceil(_SMALLEST_SIDE_PX / longest)
    if longest > _LARGEST_SIDE_PX:
        factor = _LARGEST_SIDE_PX / longest
    return round(height_px * factor), round(width_px * factor)


def enlarged(pixels: ImageArray, size_px: tuple[int, int]) -> Image.Image:
    """Return the image at a size on the page, in colour: enlarged without interpolation, or reduced with it."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    smaller = image.height > size_px[0]
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return image.resize((size_px[1], size_px[0]), how)


@lru_cache(maxsize=64)
def font_of(size_px: int, width_px: int, text: str) -> ImageFont.FreeTypeFont:
    """Return matplotlib's bundled font, at most `size_px` high and small enough for the text to fit."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for size in range(size_px, 7, -1):
        font = ImageFont.truetype(str(path), size)
        if font.getlength(text) <= width_px:
            return font
    return ImageFont.truetype(str(path), 8)


def fitting_end(text: str, width_px: float, size_px: int) -> str:
    """Return the end of a text that fits, which tells names apart; control characters become question marks."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    font = font_of(size_px, _WIDTH_PX, "0")
    if font.getlength(plain) <= width_px:
        return plain
    while plain and font.getlength(f"...{plain}") > width_px:
        plain = plain[1:]
    return f"...{plain}"
