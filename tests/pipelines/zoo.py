"""Images of every kind that sources have, whole and broken."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Animal:
    """A file of the zoo: its bytes, and why it must be refused (empty for an image that must be read)."""

    name: str
    content: bytes
    reason: str = ""


def _photograph(height_px: int = 48, width_px: int = 64) -> Image.Image:
    """Smooth colours with some noise, so that a decoder's faults show and a JPEG has entropy to damage."""
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    noise = np.random.default_rng(0).integers(0, 40, (height_px, width_px))
    planes = [rows * 200 / height_px + noise, columns * 200 / width_px + noise, 200 - rows * 150 / height_px]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole() -> Iterator[Animal]:
    """Images that must be read."""
    colour = _photograph()
    gray = colour.convert("L")
    yield Animal("baseline.jpg", _encoded(colour, "JPEG"))
    yield Animal("progressive.jpg", _encoded(colour, "JPEG", progressive=True))
    yield Animal("full-chroma.jpg", _encoded(colour, "JPEG", subsampling=0))
    yield Animal("gray.jpg", _encoded(gray, "JPEG"))
    yield Animal("cmyk.jpg", _encoded(colour.convert("CMYK"), "JPEG"))
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Animal(f"rotated-{orientation}.jpg", _encoded(colour, "JPEG", exif=exif))
    yield Animal("two-pictures.jpg", _encoded(colour, "MPO", save_all=True, append_images=[gray.convert("RGB")]))
    yield Animal("colour.PNG", _encoded(colour, "PNG"))
    yield Animal("gray.png", _encoded(gray, "PNG"))
    yield Animal("palette.png", _encoded(colour.quantize(16), "PNG"))
    yield Animal("palette-transparent.png", _encoded(colour.quantize(16), "PNG", transparency=3))
    transparent = colour.copy()
    transparent.putalpha(gray)
    yield Animal("alpha.png", _encoded(transparent, "PNG"))
    yield Animal("gray-alpha.png", _encoded(transparent.convert("LA"), "PNG"))
    yield Animal("sixteen-bit.png", _encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "PNG"))
    yield Animal("one-bit.png", _encoded(gray.convert("1"), "PNG"))
    yield Animal("lossy.webp", _encoded(colour, "WEBP"))
    yield Animal("lossless.webp", _encoded(transparent, "WEBP", lossless=True))
    yield Animal("bitmap.bmp", _encoded(colour, "BMP"))
    yield Animal("tagged.tiff", _encoded(colour, "TIFF"))
    yield Animal("still.gif", _encoded(gray, "GIF"))
    yield Animal("a-png-named.jpg", _encoded(colour.resize((30, 20)), "PNG"))
    yield Animal("one-pixel.png", _encoded(colour.resize((1, 1)), "PNG"))
    yield Animal("naïve name, ümläuts.png", _encoded(colour.resize((31, 20)), "PNG"))


def broken() -> Iterator[Animal]:
    """Files that must be refused."""
    colour = _photograph(96, 128)
    jpeg, png = _encoded(colour, "JPEG", quality=95), _encoded(colour, "PNG")
    yield Animal("empty.jpg", b"", "empty file")
    yield Animal("text.png", b"this is no image", "not a known image format")
    yield Animal("page.jpg", b"<html>404</html>", "not a known image format")
    yield Animal("truncated.jpg", jpeg[: len(jpeg) // 2], "damaged JPEG")
    yield Animal("header-only.jpg", jpeg[:30], "damaged header|not a known image format")
    yield Animal("flipped.jpg", _flipped(jpeg, 20), "damaged JPEG")
    yield Animal("truncated.png", png[: len(png) // 2], "damaged image")
    yield Animal("flipped.png", _flipped(png, 20), "damaged image")
    yield Animal("truncated.webp", _encoded(colour, "WEBP")[:200], "damaged")
    frames = [colour.rotate(angle) for angle in (0, 90)]
    yield Animal("moving.gif", _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("moving.webp", _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("moving.png", _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated")
    yield Animal("float.tiff", _encoded(colour.convert("F"), "TIFF"), "other pixels")
    yield Animal("bomb.png", _claiming(png, 30_000, 30_000), "too many pixels")
    yield Animal("bomb.jpg", _jpeg_claiming(jpeg, 30_000, 30_000), "too many pixels")


def _flipped(content: bytes, num_bits: int) -> bytes:
    """Bits flipped in the second half, where pixels are."""
    found, rng = bytearray(content), random.Random(1)
    for _ in range(num_bits):
        found[rng.randrange(len(found) // 2, len(found) - 20)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _claiming(png: bytes, height_px: int, width_px: int) -> bytes:
    """Return a PNG whose header claims another size, with a correct checksum."""
    header = b"IHDR" + struct.pack(">II", width_px, height_px) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _jpeg_claiming(jpeg: bytes, height_px: int, width_px: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height_px, width_px) + jpeg[place + 4 :]
