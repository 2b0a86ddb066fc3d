"""JPEG XL, and AVIF of more than 8 bits, by imagecodecs: Pillow reads AVIF of 8 bits, and drops the bits of others.

How many bits and channels a file has is known only when it is decoded; its size is read and checked before.
"""

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from .headers import ImageHeader, MissingLibraryError, ValueArray, check_size, damage_named

_JXL_CODESTREAM, _JXL_BOX = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_SEARCHED_BYTES = 2**16
# Properties that imagecodecs leaves out: rotation, mirroring and crop, each with the size of its box.
_TURNS = (b"\0\0\0\x09irot", b"\0\0\0\x09imir", b"\0\0\0\x28clap")
# Widths of a number by its two-bit selector, and aspect ratios by number (ISO 18181-1, size header).
_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def recognises(content: bytes) -> bool:
    return content[:2] == _JXL_CODESTREAM or content[:12] == _JXL_BOX or _is_deep_avif(content)


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    if _is_deep_avif(content) and any(turn in content[:_SEARCHED_BYTES] for turn in _TURNS):
        raise ValueError("unsupported pixels: AVIF of more than 8 bits to be turned or cropped; save it upright")
    height, width = _avif_size(content) if _is_deep_avif(content) else _jxl_size(content)
    check_size(height, width, 1, max_pixels)
    values = _decoded(content)
    if values.shape[:2] != (height, width):
        raise ValueError(f"damaged image: {values.shape} values, where the header says {height} x {width}")
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=values.shape[2],
        format="AVIF" if _is_deep_avif(content) else "JXL",
        dtype=values.dtype.name,
        is_plain=False,
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    return _decoded(content), None


def _is_deep_avif(content: bytes) -> bool:
    if content[4:12] not in (b"ftypavif", b"ftypavis"):
        return False
    at = content.find(b"av1C", 0, _SEARCHED_BYTES)
    return at >= 0 and len(content) > at + 6 and bool(content[at + 6] & 0x40)


def _avif_size(content: bytes) -> tuple[int, int]:
    """Return height and width of the largest image: a grid's tiles have a size of their own."""
    sizes, at = [], content.find(b"ispe", 0, _SEARCHED_BYTES)
    while at >= 0 and len(content) >= at + 16:
        width, height = struct.unpack_from(">II", content, at + 8)
        sizes.append((height, width))
        at = content.find(b"ispe", at + 4, _SEARCHED_BYTES)
    if not sizes:
        raise ValueError("damaged header: AVIF without a size")
    return max(sizes, key=lambda size: size[0] * size[1])


def _jxl_size(content: bytes) -> tuple[int, int]:
    at = 0
    if content[:2] != _JXL_CODESTREAM:
        at = content.find(b"jxlc", 0, _SEARCHED_BYTES) + 4
        if at < 4:
            # A codestream in parts: a counter precedes each.
            at = content.find(b"jxlp", 0, _SEARCHED_BYTES) + 8
    if content[at : at + 2] != _JXL_CODESTREAM or len(content) < at + 12:
        raise ValueError("damaged header: JPEG XL without a size")
    bits = int.from_bytes(content[at + 2 : at + 12], "little")

    def take(count: int) -> int:
        nonlocal bits
        found, bits = bits & ((1 << count) - 1), bits >> count
        return found

    is_small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take(_BITS[take(2)]) + 1

    height = side()
    ratio = take(3)
    if not ratio:
        return height, side()
    across, down = _RATIOS[ratio - 1]
    return height, height * across // down


@lru_cache(maxsize=4)
def _decoded(content: bytes) -> ValueArray:
    """Return the values [height width channels]. Raises ValueError for alpha and animations."""
    try:
        from imagecodecs import avif_decode, jpegxl_decode
    except ImportError:
        raise MissingLibraryError("JPEG XL and AVIF of more than 8 bits", "imagecodecs", "deep") from None
    with damage_named():
        found = avif_decode(content) if _is_deep_avif(content) else jpegxl_decode(content)
    found = found[:, :, None] if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[2] not in (1, 3) or found.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"unsupported pixels: {found.dtype} of {found.shape}, with alpha or several frames perhaps")
    found.flags.writeable = False
    return found
