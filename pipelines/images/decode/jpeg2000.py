"""JPEG 2000 by imagecodecs (OpenJPEG), the values as they are coded: Pillow scales 12 bits to 16, and drops others."""

import struct

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from .headers import ImageHeader, MissingLibraryError, ValueArray, check_size, damage_named

_BOX, _CODESTREAM = b"jP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_SEARCHED_BYTES = 2**20


def recognises(content: bytes) -> bool:
    return content[4:12] == _BOX or content[:4] == _CODESTREAM


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    height, width, bits, channels = _size(content)
    check_size(height, width, channels, max_pixels)
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=channels,
        format="JPEG2000",
        dtype="uint8" if bits <= 8 else "uint16",
        is_plain=False,
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    height, width, bits, channels = _size(content)
    try:
        from imagecodecs import jpeg2k_decode
    except ImportError:
        raise MissingLibraryError("JPEG 2000", "imagecodecs", "deep") from None
    with damage_named():
        found = jpeg2k_decode(content)
    if found.size != height * width * channels:
        raise ValueError(f"damaged image: {found.shape} values, where the header says {height} x {width} x {channels}")
    return found.reshape(height, width, channels).astype("uint8" if bits <= 8 else "uint16", copy=False), None


def _size(content: bytes) -> tuple[int, int, int, int]:
    """Return height, width, bits and components from marker segment SIZ. Raises ValueError for what is not read."""
    at = content.find(_CODESTREAM, 0, _SEARCHED_BYTES)
    try:
        _, _, right, bottom, left, top = struct.unpack_from(">HHIIII", content, at + 4)
        (channels,) = struct.unpack_from(">H", content, at + 40)
        parts = [struct.unpack_from(">BBB", content, at + 42 + 3 * i) for i in range(min(channels, 65))]
    except struct.error:
        raise ValueError("damaged header: JPEG 2000 without a size") from None
    if at < 0 or not parts or right <= left or bottom <= top:
        raise ValueError("damaged header: JPEG 2000 without a size")
    depths = {depth for depth, _, _ in parts}
    if len(depths) > 1 or depths.pop() & 0x80 or any(step != (1, 1) for _, *rest in parts for step in [tuple(rest)]):
        raise ValueError("unsupported pixels: JPEG 2000 of signed, mixed or subsampled components")
    bits = parts[0][0] + 1
    if bits > 16:
        raise ValueError(f"unsupported pixels: JPEG 2000 of {bits} bits")
    if content[4:12] == _BOX and b"pclr" in content[:at]:
        raise ValueError("unsupported pixels: JPEG 2000 with a palette; convert it to RGB")
    return bottom - top, right - left, bits, channels
