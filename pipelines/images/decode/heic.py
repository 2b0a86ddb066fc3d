"""HEIC by pillow-heif: 8 to 12 bits, as coded.

libheif turns and mirrors an image as the file says; EXIF's orientation, which would turn it again, does not count.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from .headers import ImageHeader, MissingLibraryError, ValueArray, check_size, damage_named

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 3}


def recognises(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in _BRANDS


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    images = _images(content)
    image = images[0]
    width, height = image.size
    check_size(height, width, 1, max_pixels)
    mode, _, bits = image.mode.partition(";")
    if mode not in _CHANNELS or (bits and mode == "RGBA"):
        raise ValueError(f"unsupported pixels: HEIC of mode {image.mode}")
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=_CHANNELS[mode],
        format="HEIC",
        dtype="uint16" if bits else "uint8",
        is_plain=False,
        num_frames=len(images),
        notes=("alpha composited over white",) if mode == "RGBA" else (),
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    images = _images(content)
    image = images[frame]
    if (image.size, image.mode) != (images[0].size, images[0].mode):
        raise ValueError(f"other pages: image {frame} has other pixels or another size than the first; split the file")
    with damage_named():
        values = np.asarray(image)
    width, height = image.size
    values = values.reshape(height, width, -1)
    if image.mode == "RGBA":
        colours, alpha = values[:, :, :3].astype(np.int64), values[:, :, 3:].astype(np.int64)
        values = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(values), None


def _images(content: bytes) -> list[Any]:
    """Return the images of a file, the primary one first, without decoding them."""
    try:
        import pillow_heif
    except ImportError:
        raise MissingLibraryError("HEIC", "pillow-heif", "heic") from None
    try:
        found = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=False, hdr_to_16bit=False)
    except Exception as error:
        raise ValueError(f"damaged header: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
    first = found.primary_index
    return [found[first], *(image for number, image in enumerate(found) if number != first)]
