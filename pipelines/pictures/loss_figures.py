"""Draw images with their masked version, their reconstruction and its loss."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipelines.images.decode import ImageArray
from pipelines.pictures.figures import enlarged, fitting_end, font_of, shown_size

_COLUMNS = ("original", "masked", "reconstruction")
_WIDTH_PX = 1500
_GAP_PX, _ENTRY_GAP_PX, _MARGIN_PX = 4, 24, 28
_TITLE_PX, _TEXT_PX, _LINE_PX = 26, 15, 20
_INK, _GRAY = (20, 20, 20), (95, 95, 95)


@dataclass(frozen=True)
class Reconstructed:
    """One image of the picture."""

    name: str
    label: str | None
    loss: float
    triple: tuple[ImageArray, ImageArray, ImageArray]
    """Original, masked, reconstruction: uint8 [height width channels]."""


def loss_figure(title: str, shown: Sequence[Reconstructed]) -> bytes:
    """Return a PNG: triples in rows, each above its loss, label and name, in the order given."""
    height_px, width_px = shown_size(shown[0].triple[0])
    entry_px = 3 * width_px + 2 * _GAP_PX
    across = max(1, min(len(shown), (_WIDTH_PX - 2 * _MARGIN_PX + _ENTRY_GAP_PX) // (entry_px + _ENTRY_GAP_PX)))
    row_px = height_px + _LINE_PX + _GAP_PX + _ENTRY_GAP_PX
    top_px = _MARGIN_PX + round(1.5 * _TITLE_PX) + _LINE_PX
    page_px = 2 * _MARGIN_PX + across * entry_px + (across - 1) * _ENTRY_GAP_PX
    num_rows = -(-len(shown) // across)
    page = Image.new("RGB", (page_px, top_px + num_rows * row_px - _ENTRY_GAP_PX + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=font_of(_TITLE_PX, page_px - 2 * _MARGIN_PX, title))
    for number, entry in enumerate(shown):
        row, column = divmod(number, across)
        left, top = _MARGIN_PX + column * (entry_px + _ENTRY_GAP_PX), top_px + row * row_px
        for place, (pixels, name) in enumerate(zip(entry.triple, _COLUMNS, strict=True)):
            x = left + place * (width_px + _GAP_PX)
            page.paste(enlarged(pixels, (height_px, width_px)), (x, top))
            if row == 0:
                font = font_of(_TEXT_PX, width_px, "reconstruction")
                draw.text((x + width_px / 2, top - 6), name, fill=_GRAY, font=font, anchor="ms")
        _caption(draw, entry, left, top + height_px + _GAP_PX, entry_px)
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _caption(draw: ImageDraw.ImageDraw, entry: Reconstructed, left: int, top: int, width_px: int) -> None:
    """Write the loss, and the end of the name as far as it fits: it tells images apart."""
    loss = f"loss {entry.loss:.3f}"
    draw.text((left, top), loss, fill=_INK, font=font_of(_TEXT_PX, width_px, loss))
    begin = left + font_of(_TEXT_PX, width_px, loss).getlength(loss) + 12
    name = fitting_end(entry.name, left + width_px - begin, _TEXT_PX)
    draw.text((begin, top), name, fill=_GRAY, font=font_of(_TEXT_PX, width_px, "0"))
