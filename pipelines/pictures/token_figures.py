"""Draw images beside maps of their patches: colours of tokens, attention, predicted and true segments."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.images.decode import ImageArray
from pipelines.pictures.figures import shown_pixels

_SIDE_PX, _GAP_PX, _MARGIN_PX, _FONT_PX, _LINE_PX = 224, 6, 20, 14, 22
_INK, _GRAY = (20, 20, 20), (95, 95, 95)
_IGNORED = (160, 160, 160)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet with the caption above it; small pictures are enlarged without interpolation."""

    caption: str
    pixels: ImageArray
    """uint8 [height width 3]"""


def panel_sheet(
    rows: Sequence[tuple[str, Sequence[Panel]]],
    across: int,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> bytes:
    """Return a PNG with one block per row: a title above its panels, `across` of them beside each other."""
    height_px, width_px = _shown_size(rows[0][1][0].pixels)
    columns = min(across, max(len(panels) for _, panels in rows))
    line_px = height_px + _LINE_PX + _GAP_PX
    blocks = [_LINE_PX + math.ceil(len(panels) / columns) * line_px + _GAP_PX for _, panels in rows]
    page_px = 2 * _MARGIN_PX + columns * width_px + (columns - 1) * _GAP_PX
    legend_lines = _legend_lines(legend, page_px - 2 * _MARGIN_PX)
    page = Image.new("RGB", (page_px, 2 * _MARGIN_PX + sum(blocks) + len(legend_lines) * _LINE_PX), "white")
    draw, top = ImageDraw.Draw(page), _MARGIN_PX
    for (title, panels), block_px in zip(rows, blocks, strict=True):
        draw.text((_MARGIN_PX, top), _fit(title, page_px - 2 * _MARGIN_PX), fill=_INK, font=_font())
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            x, y = _MARGIN_PX + column * (width_px + _GAP_PX), top + _LINE_PX + row * line_px
            draw.text((x, y), _fit(panel.caption, width_px), fill=_GRAY, font=_font())
            page.paste(_enlarged(panel.pixels, (height_px, width_px)), (x, y + _LINE_PX))
        top += block_px
    for line in legend_lines:
        for x, name, color in line:
            draw.rectangle((_MARGIN_PX + x, top + 3, _MARGIN_PX + x + 12, top + 15), fill=color, outline=_GRAY)
            draw.text((_MARGIN_PX + x + 18, top), name, fill=_INK, font=_font())
        top += _LINE_PX
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def heat(values: NDArray[np.floating]) -> ImageArray:
    """Colour a map [rows columns] from 0, dark, to its maximum, bright."""
    import matplotlib

    shares = values / max(float(values.max()), 1e-12)
    return (matplotlib.colormaps["inferno"](shares)[..., :3] * 255).round().astype(np.uint8)


def segment_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """Return one colour per class: hues by the golden ratio, so that neighbours differ, in three brightnesses."""
    import colorsys

    found = []
    for i in range(num_classes):
        color = colorsys.hsv_to_rgb((0.58 + i * 0.618034) % 1, (0.75, 0.45, 0.95)[i % 3], (0.80, 0.95, 0.55)[i % 3])
        found.append((round(255 * color[0]), round(255 * color[1]), round(255 * color[2])))
    return found


def segments(mask: NDArray[np.integer], colors: Sequence[tuple[int, int, int]], ignore: int) -> ImageArray:
    """Colour a mask [height width] of class indices; ignored pixels are gray."""
    table = np.full((max(ignore, int(mask.max())) + 1, 3), _IGNORED, np.uint8)
    table[: len(colors)] = colors
    table[ignore] = _IGNORED
    return table[mask]


def as_color(pixels: ImageArray) -> ImageArray:
    """Return pixels, uint8 or from 0 to 1, in three channels of uint8, as `figures.shown_pixels` chooses them."""
    shown = shown_pixels(pixels)
    return np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown


def _shown_size(pixels: ImageArray) -> tuple[int, int]:
    height_px, width_px = pixels.shape[:2]
    factor = _SIDE_PX / max(height_px, width_px)
    factor = math.floor(factor) if factor >= 2 else factor
    return max(1, round(height_px * factor)), max(1, round(width_px * factor))


def _enlarged(pixels: ImageArray, size_px: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    is_smaller = image.height < size_px[0]
    how = Image.Resampling.NEAREST if is_smaller else Image.Resampling.LANCZOS
    return image.resize((size_px[1], size_px[0]), how)


def _legend_lines(
    legend: Sequence[tuple[str, tuple[int, int, int]]], width_px: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Return lines of (left edge, name, colour), broken to the width."""
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = []
    x = width_px + 1
    for name, color in legend:
        entry_px = 18 + round(_font().getlength(name)) + 16
        if x + entry_px > width_px:
            lines.append([])
            x = 0
        lines[-1].append((x, name, color))
        x += entry_px
    return lines


def _fit(text: str, width_px: int) -> str:
    """Return printable text that fits, its middle left out if it is long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if _font().getlength(text) <= width_px:
        return text
    for half in range(len(text) // 2, 0, -1):
        shorter = f"{text[:half]}...{text[-half:]}"
        if _font().getlength(shorter) <= width_px:
            return shorter
    return ""


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's bundled font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _FONT_PX)
