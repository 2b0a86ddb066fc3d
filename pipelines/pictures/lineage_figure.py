"""Draw a lineage: versions and the runs that made them from top to bottom, each run's dataset and commit beside it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipelines.pictures.figures import fitting_end, font_of

_BOX_PX, _GAP_PX, _MARGIN_PX, _PADDING_PX = 620, 44, 28, 14
_TITLE_PX, _HEAD_PX, _TEXT_PX, _LINE_PX = 26, 18, 15, 21
_INK, _GRAY, _EDGE = (20, 20, 20), (95, 95, 95), (150, 150, 150)
_VERSION, _RUN, _BESIDE = (226, 238, 250), (240, 240, 240), (233, 246, 231)


@dataclass(frozen=True)
class Box:
    """A version or a run, and what the run read, as (heading, lines)."""

    head: str
    lines: tuple[str, ...]
    is_run: bool = False
    beside: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def height_px(self) -> int:
        beside = sum(_height_px(len(lines)) + _PADDING_PX for _, lines in self.beside) - _PADDING_PX
        return max(_height_px(len(self.lines)), beside)


def lineage_figure(title: str, boxes: Sequence[Box]) -> bytes:
    """Return a PNG: the boxes from top to bottom, an arrow from each to the one above, which was made from it."""
    top_px = _MARGIN_PX + 2 * _TITLE_PX
    page_px = 2 * (_MARGIN_PX + _BOX_PX) + _GAP_PX
    height_px = top_px + sum(box.height_px + _GAP_PX for box in boxes) - _GAP_PX + _MARGIN_PX
    page = Image.new("RGB", (page_px, height_px), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=font_of(_TITLE_PX, page_px - 2 * _MARGIN_PX, title))
    top = top_px
    for number, box in enumerate(boxes):
        _draw_box(draw, _MARGIN_PX, top, box.height_px, box.head, box.lines, _RUN if box.is_run else _VERSION)
        right, right_top = _MARGIN_PX + _BOX_PX + _GAP_PX, top
        for head, lines in box.beside:
            height = _height_px(len(lines))
            _draw_box(draw, right, right_top, height, head, lines, _BESIDE)
            middle = right_top + height / 2
            _arrow(draw, (right, middle), (_MARGIN_PX + _BOX_PX, middle))
            right_top += height + _PADDING_PX
        if number:
            _arrow(draw, (_MARGIN_PX + _BOX_PX / 2, top), (_MARGIN_PX + _BOX_PX / 2, top - _GAP_PX))
        top += box.height_px + _GAP_PX
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _height_px(num_lines: int) -> int:
    return 2 * _PADDING_PX + _HEAD_PX + 6 + num_lines * _LINE_PX


def _draw_box(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    height_px: int,
    head: str,
    lines: Sequence[str],
    fill: tuple[int, int, int],
) -> None:
    width_px = _BOX_PX - 2 * _PADDING_PX
    draw.rounded_rectangle((left, top, left + _BOX_PX, top + height_px), 8, fill, _EDGE)
    font = font_of(_HEAD_PX, width_px, "0")
    draw.text((left + _PADDING_PX, top + _PADDING_PX), fitting_end(head, width_px, _HEAD_PX), fill=_INK, font=font)
    for number, line in enumerate(lines):
        y = top + _PADDING_PX + _HEAD_PX + 6 + number * _LINE_PX
        shown = fitting_end(line, width_px, _TEXT_PX)
        draw.text((left + _PADDING_PX, y), shown, fill=_GRAY, font=font_of(_TEXT_PX, width_px, "0"))


def _arrow(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a horizontal or vertical arrow."""
    draw.line((*start, *end), fill=_EDGE, width=3)
    (x, y), across = end, start[1] == end[1]
    forward = 12 if (start[0] > end[0] if across else start[1] > end[1]) else -12
    wings = ((x + forward, y - 7), (x + forward, y + 7)) if across else ((x - 7, y + forward), (x + 7, y + forward))
    draw.polygon((end, *wings), fill=_EDGE)
