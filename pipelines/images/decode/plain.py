"""Decode the formats that Pillow reads to upright uint8 pixels of one or three channels, or refuse them with a reason.

The header is read and checked first: a small file can claim more pixels than fit in memory, and most decoders would
allocate them.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .headers import MAX_PIXELS, ImageArray, ImageHeader
from .tiff_header import SIGNATURES, UNASSOCIATED, TiffHeader, read_tiff_header

Box = tuple[int, int, int, int]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L")
_MODES = (*_GRAY_MODES, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_EXIF_ORIENTATION = 0x0112
_TOLERATED = "extraneous bytes before marker"
"""libjpeg's warning about bytes that belong to nothing; every pixel is there."""
TOLERATED_NOTE = f"JPEG with {_TOLERATED}"
_MAX_GAPS = 8
UNCLEAR_ALPHA = (
    "unclear fourth band: the last band is declared as unassociated alpha, as GDAL also declares near infrared, and is "
    "no mask of 0 and the largest value; say --fourth-band band, or --fourth-band alpha to composite it over white"
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_MAX_TEXT_BYTES = 4 * 2**20
_MAX_PNG_CHUNKS = 100_000
_MAX_JPEG_SCANS = 100
_MAX_SCRATCH_BYTES = 64 * 2**20

# `inspect` applies our own limit before decoding. Pillow's fixed limit would refuse what the user allows.
Image.MAX_IMAGE_PIXELS = None
# Limit on the unpacked text of one file. Pillow's default is 64 MB.
PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES


def inspect(content: bytes, max_pixels: int = MAX_PIXELS, tiff: TiffHeader | None = None) -> ImageHeader:
    """Read the header without decoding the pixels; `tiff` is that of a TIFF of one page, which may have overviews.

    Raises ValueError with the reason, its kind before the colon, for empty or unknown files, more than `max_pixels`,
    animations, and pixel formats without an 8-bit equivalent.
    """
    if not content:
        raise ValueError("empty file")
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        # Each scan is decoded over the entire image, so a file of a few kB could take minutes.
        raise ValueError(f"too many scans: more than {_MAX_JPEG_SCANS}")
    if content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
        raise ValueError(f"not a known image format: a container of {content[8:12]!r}; convert it, such as to PNG")
    may_turn = _png_may_turn(content) if content.startswith(_PNG_SIGNATURE) else True
    with opened(content, "damaged header") as image:
        return _header(image, max_pixels, may_turn, tiff)


def _png_may_turn(content: bytes) -> bool:
    """Return whether a PNG has chunks that could hold an orientation: to search them, Pillow decodes the entire image.

    Raises ValueError for too much text, before copying or unpacking it.
    """
    at, text_bytes, may_turn = len(_PNG_SIGNATURE), 0, False
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 8 > len(content):
            return may_turn
        size, kind = struct.unpack_from(">I4s", content, at)
        at += 12 + size
        text_bytes += size if kind in _PNG_TEXT else 0
        may_turn |= kind in _PNG_TEXT or kind == b"eXIf"
        if text_bytes > _MAX_TEXT_BYTES:
            raise ValueError(f"too much text: more than {_MAX_TEXT_BYTES} bytes beside the pixels")
    raise ValueError(f"too many chunks: more than {_MAX_PNG_CHUNKS}")


@contextmanager
def opened(content: bytes, reason: str) -> Iterator[Image.Image]:
    """Open the file with Pillow; turn its exceptions of any type into ValueError and suppress its warnings."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise ValueError("not a known image format") from None
    except Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise ValueError(f"{reason}: {error or type(error).__name__}") from None


class Refused(ValueError):
    """An intact image of a kind that we do not accept."""


def _header(image: Image.Image, max_pixels: int, may_turn: bool, tiff: TiffHeader | None) -> ImageHeader:
    width, height = image.size
    if width * height > max_pixels:
        raise Refused(f"too many pixels: {width} x {height} is more than max_pixels {max_pixels}")
    if width < 1 or height < 1:
        raise Refused(f"no pixels: {width} x {height}")
    # Cameras write MPO, a JPEG followed by further pictures. The first one is the photograph.
    # Further pages of a cloud-optimised GeoTIFF are overviews.
    if image.format != "MPO" and tiff is None and getattr(image, "is_animated", False):
        raise Refused("animated or several pages: of GIF, PNG and WebP none is chosen; save the frames as images")
    if image.mode not in _MODES:
        raise Refused(f"unsupported pixels: mode {image.mode}")
    # Pillow turns a TIFF upright by itself, and its size is that of the upright image.
    orientation = _orientation(image) if may_turn and tiff is None else 1
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=orientation,
        channels=1 if image.mode in _GRAY_MODES else 3,
        format="JPEG" if image.format == "MPO" else str(image.format),
    )


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 if it is missing or unreadable."""
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


class Scratch:
    """Buffers that one thread reuses for every image: mapping fresh pages would add a fifth to decoding time."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def of(self, purpose: str, count: int, kind: type[np.generic] = np.uint8) -> NDArray[Any]:
        """Return a buffer of at least `count` elements, reusing (and overwriting) the one for the same purpose."""
        found = self._held.get(purpose)
        if found is None or len(found) < count:
            # A multiple of 64 elements, for callers that reshape the buffer into rows.
            found = np.empty(count + count // 4 + 63 & ~63, kind)
            if found.nbytes <= _MAX_SCRATCH_BYTES:
                self._held[purpose] = found
        return found


def decode(
    content: bytes, channels: int, orientation: int, scratch: Scratch | None = None, notes: list[str] | None = None
) -> ImageArray:
    """Decode to upright pixels [height width channels]. Raises ValueError with the reason if the image is damaged.

    Gray becomes colour by repetition, and colour becomes gray by luma; alpha is composited over white. With `scratch`,
    the result may be one of its buffers. A fault that costs no pixel is added to `notes`.
    """
    pixels = _jpeg(content, channels, scratch, notes) if content.startswith(b"\xff\xd8") else None
    if pixels is None:
        pixels = _decode_any(content, channels)
    return upright(pixels, orientation)


def _jpeg(content: bytes, channels: int, scratch: Scratch | None, notes: list[str] | None) -> ImageArray | None:
    """Decode a JPEG; None for one that is left to Pillow: CMYK, and whole files with bytes that belong to nothing."""
    try:
        return decode_jpeg(content, channels, scratch)
    except ValueError as error:
        if not _is_whole(content, str(error)):
            raise
        if notes is not None:
            notes.append(TOLERATED_NOTE)
        return None


def _is_whole(content: bytes, reason: str) -> bool:
    """Return whether a JPEG decodes without a complaint once bytes that belong to nothing are taken out.

    These are bytes between the segments of the header, and padding of equal bytes before the end. Others before the end
    are what damaged codes leave over.
    """
    for _ in range(_MAX_GAPS):
        found = re.search(rf"(\d+) {_TOLERATED} 0x([0-9a-f]{{2}})", reason)
        if found is None:
            return False
        num_bytes, marker = int(found[1]), bytes([0xFF, int(found[2], 16)])
        first_scan, end = content.find(b"\xff\xda"), content.rfind(b"\xff\xd9")
        at = end if marker == b"\xff\xd9" else _after_gap(content, num_bytes, marker)
        gap = content[at - num_bytes : at]
        if at < num_bytes or (at > first_scan and len(set(gap)) > 1):
            return False
        content = content[: at - num_bytes] + content[at:]
        try:
            decode_jpeg(content, 1, None)
            return True
        except ValueError as error:
            reason = str(error)
    return False


def _after_gap(content: bytes, num_bytes: int, marker: bytes) -> int:
    """Return where the header goes on after bytes that belong to no segment; -1 if that is nowhere."""
    at = 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        if content[at + 1] == 0xDA:
            return -1
        at += 1 if content[at + 1] == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return at + num_bytes if content[at + num_bytes : at + num_bytes + 2] == marker else -1


def decode_jpeg(content: bytes | bytearray | ImageArray, channels: int, scratch: Scratch | None) -> ImageArray | None:
    """Decode with libjpeg-turbo, which unlike Pillow refuses damaged data. Returns None for CMYK, left to Pillow."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        if colorspace in ("CMYK", "YCCK"):
            return None
        buffer = scratch.of("pixels", int(height) * int(width) * channels) if scratch else None
        return simplejpeg.decode_jpeg(content, colorspace="GRAY" if channels == 1 else "RGB", buffer=buffer)
    except ValueError as error:
        raise ValueError(f"damaged JPEG: {error}") from None


def _decode_any(content: bytes, channels: int) -> ImageArray:
    mode = "L" if channels == 1 else "RGB"
    with opened(content, "damaged image") as image:
        plain = image.mode == mode and "transparency" not in image.info
        pixels = np.asarray(image if plain else _convert(image, mode, content))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _convert(image: Image.Image, mode: str, content: bytes) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if content[:4] in SIGNATURES and read_tiff_header(content).alpha == UNASSOCIATED:
            refuse_unclear_alpha(np.asarray(image)[:, :, 3])
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def refuse_unclear_alpha(alpha: NDArray[Any]) -> None:
    """Raise an error if a band that a TIFF declares as unassociated alpha is no mask: it may be near infrared."""
    largest = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
    if ((alpha != 0) & (alpha != largest)).any():
        raise Refused(UNCLEAR_ALPHA)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Rotate and mirror the image according to EXIF's orientation (1 to 8)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def as_channels(pixels: ImageArray, channels: int) -> ImageArray:
    """Convert gray to colour by repetition, or colour to gray by luma."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
