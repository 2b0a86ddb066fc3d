"""Draw a sheet of thumbnails, each with its name and a note. A broken image is drawn as far as it decodes."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFile, ImageFont

from pipelines.images.decode import preview

_COLUMNS = 8
_SIDE_PX = 128
_GAP_PX = 8
_TEXT_PX = 11
_LINE_PX = 14
_HEADING_PX = 26
# Broken files are decoded by a tolerant decoder without our checks, so only if their header claims few pixels.
_MAX_TOLERATED_PIXELS = 16_000_000


@dataclass(frozen=True)
class Tile:
    """One image of the sheet."""

    name: str
    note: str
    content: bytes
    orientation: int | None = None
    """EXIF orientation, if the content no longer contains it."""


def contact_sheet(title: str, readable: Sequence[Tile], broken: Sequence[Tile]) -> bytes:
    """Return a PNG with the readable images, followed by the quarantined ones."""
    sections = [(f"{title}: samples", readable), ("quarantine", broken)]
    sections = [(heading, tiles) for heading, tiles in sections if tiles]
    row_px = _SIDE_PX + 2 * _LINE_PX + _GAP_PX
    heights = [_HEADING_PX + -(-len(tiles) // _COLUMNS) * row_px for _, tiles in sections]
    width = _COLUMNS * (_SIDE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, sum(heights) + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (heading, tiles), height in zip(sections, heights):
        draw.text(
            (_GAP_PX, top + 6), _fit(heading, width // 7), fill="black", font=ImageFont.load_default(_TEXT_PX + 2)
        )
        for i, tile in enumerate(tiles):
            row, column = divmod(i, _COLUMNS)
            left = _GAP_PX + column * (_SIDE_PX + _GAP_PX)
            _draw_tile(sheet, draw, tile, left, top + _HEADING_PX + row * row_px)
        top += height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    font = ImageFont.load_default(_TEXT_PX)
    picture = _thumbnail(tile.content, tile.orientation)
    draw.rectangle((left, top, left + _SIDE_PX - 1, top + _SIDE_PX - 1), fill="#eeeeee")
    if picture is None:
        draw.line((left, top, left + _SIDE_PX - 1, top + _SIDE_PX - 1), fill="#bbbbbb")
        draw.line((left, top + _SIDE_PX - 1, left + _SIDE_PX - 1, top), fill="#bbbbbb")
    else:
        sheet.paste(picture, (left + (_SIDE_PX - picture.width) // 2, top + (_SIDE_PX - picture.height) // 2))
    letters = _SIDE_PX // 7
    name = tile.name if len(tile.name) <= letters else "..." + tile.name[-letters + 3 :]
    draw.text((left, top + _SIDE_PX + 1), _plain(name), fill="black", font=font)
    draw.text((left, top + _SIDE_PX + 1 + _LINE_PX), _plain(_fit(tile.note, letters)), fill="#aa0000", font=font)


def _thumbnail(content: bytes, orientation: int | None) -> Image.Image | None:
    """Return a thumbnail of the image, by a tolerant decoder if it is broken; None if nothing can be decoded."""
    try:
        picture = Image.fromarray(preview(content, orientation))
    except ValueError:
        picture = _tolerated(content)
    if picture is not None:
        picture.thumbnail((_SIDE_PX, _SIDE_PX))
    return picture


def _tolerated(content: bytes) -> Image.Image | None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > _MAX_TOLERATED_PIXELS:
                return None
            return image.convert("RGB")
    except Exception:
        # A decoder may raise anything on malformed bytes.
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _fit(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _plain(text: str) -> str:
    """Replace control characters, which names in a source may contain."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
