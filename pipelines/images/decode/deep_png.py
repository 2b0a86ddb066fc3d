"""PNG of 16 bits: gray by Pillow, which drops the low bits of all others, and those by imagecodecs."""

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from . import plain
from .headers import ImageHeader, MissingLibraryError, ValueArray, damage_named

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _COLOUR = (0, 4), (2, 6)


def recognises(content: bytes) -> bool:
    return content[:8] == _SIGNATURE and content[24:25] == b"\x10"


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    found = plain.inspect(content, max_pixels)
    kind = content[25]
    if kind not in (*_GRAY, *_COLOUR):
        raise ValueError(f"damaged header: a PNG of 16 bits and colour type {kind}")
    if b"tRNS" in content[: content.find(b"IDAT")]:
        raise ValueError("unsupported pixels: a transparent colour in a PNG of 16 bits; use an alpha channel, or none")
    changes = {"dtype": "uint16", "is_plain": False, "channels": 1 if kind in _GRAY else 3}
    return ImageHeader(**{**vars(found), **changes})


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    """Alpha is composited over white."""
    if content[25] == 0:
        with plain.opened(content, "damaged image") as image:
            return np.array(image, np.uint16)[:, :, None], None
    try:
        from imagecodecs import png_decode
    except ImportError:
        raise MissingLibraryError("a PNG of 16 bits in colour or with alpha", "imagecodecs", "deep") from None
    with damage_named():
        stored = png_decode(content)
    assert stored.dtype == np.uint16
    if stored.shape[2] == 3:
        return stored, None
    white, shares = 65535, stored[:, :, -1:].astype(np.int64)
    found = (stored[:, :, :-1].astype(np.int64) * shares + white * (white - shares) + white // 2) // white
    return found.astype(np.uint16), None
