"""Draw query images and their nearest neighbours, each with its score and label."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipelines.images.decode import ImageArray
from pipelines.pictures.figures import enlarged, fitting_end, font_of

_SIDE_PX, _GAP_PX, _QUERY_GAP_PX, _MARGIN_PX = 128, 8, 28, 28
_TITLE_PX, _TEXT_PX, _LINE_PX = 24, 13, 17
_FRAME_PX = 3
_INK, _GRAY, _SAME, _OTHER = (20, 20, 20), (95, 95, 95), (31, 119, 60), (194, 87, 26)


@dataclass(frozen=True)
class Found:
    """A query, or a neighbour with its score."""

    image: ImageArray
    label: str | None
    name: str
    score: float | None = None


def neighbour_figure(title: str, rows: Sequence[Sequence[Found]]) -> bytes:
    """Return a PNG: one query per row, then its neighbours, the nearest first.

    Captions hold score and label, or the end of the name of an unlabelled image. A neighbour's frame is green if it has
    the query's label, and orange if it has another.
    """
    most = max(len(row) for row in rows)
    row_px = _SIDE_PX + 2 * _LINE_PX + _GAP_PX
    top_px = _MARGIN_PX + round(1.6 * _TITLE_PX)
    page_px = 2 * _MARGIN_PX + most * (_SIDE_PX + _GAP_PX) - _GAP_PX + _QUERY_GAP_PX
    page = Image.new("RGB", (page_px, top_px + len(rows) * row_px - _GAP_PX + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=font_of(_TITLE_PX, page_px - 2 * _MARGIN_PX, title))
    for number, (query, *near) in enumerate(rows):
        top = top_px + number * row_px
        _draw(page, draw, query, (_MARGIN_PX, top), "query", None)
        for place, found in enumerate(near, start=1):
            left = _MARGIN_PX + _QUERY_GAP_PX + place * (_SIDE_PX + _GAP_PX)
            frame = None
            if query.label is not None and found.label is not None:
                frame = _SAME if found.label == query.label else _OTHER
            _draw(page, draw, found, (left, top), f"{found.score:.3f}", frame)
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _draw(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    found: Found,
    place: tuple[int, int],
    said: str,
    frame: tuple[int, int, int] | None,
) -> None:
    left, top = place
    height_px, width_px = found.image.shape[:2]
    scale = (_SIDE_PX - 2 * _FRAME_PX) / max(height_px, width_px)
    size_px = max(1, round(height_px * scale)), max(1, round(width_px * scale))
    offset = left + (_SIDE_PX - size_px[1]) // 2, top + (_SIDE_PX - size_px[0]) // 2
    page.paste(enlarged(found.image, size_px), offset)
    if frame is not None:
        edge = offset[0] - _FRAME_PX, offset[1] - _FRAME_PX
        far = offset[0] + size_px[1] + _FRAME_PX - 1, offset[1] + size_px[0] + _FRAME_PX - 1
        draw.rectangle((*edge, *far), outline=frame, width=_FRAME_PX)
    font = font_of(_TEXT_PX, _SIDE_PX, "0")
    draw.text((left, top + _SIDE_PX + 2), said, fill=_INK, font=font)
    below = fitting_end(found.label or found.name, _SIDE_PX, _TEXT_PX)
    draw.text((left, top + _SIDE_PX + 2 + _LINE_PX), below, fill=frame or _GRAY, font=font)
