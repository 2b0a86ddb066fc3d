"""NumPy arrays (`.npy`) of one image: [height width], [height width channels] or [channels height width]."""

import io
import math

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading
from mae_core.values import NO_DATA

from .headers import MAX_CHANNELS, ImageHeader, ValueArray, as_kept, check_size, kept_dtype

_SIGNATURE = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def recognises(content: bytes) -> bool:
    return content[:6] == _SIGNATURE


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    shape, dtype, start = _header(content)
    height, width, channels = _layout(shape)
    check_size(height, width, channels, max_pixels)
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"damaged image: {len(content) - start} bytes cannot be {shape} of {dtype}")
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=channels,
        format="NPY",
        dtype=kept_dtype(dtype.newbyteorder("=").name),
        is_plain=False,
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    shape, _, _ = _header(content)
    found = np.load(io.BytesIO(content), allow_pickle=False)
    if len(shape) == 2:
        found = found[:, :, None]
    elif _is_channels_first(shape):
        found = np.moveaxis(found, 0, 2)
    if found.dtype.kind == "f":
        if np.isinf(found).any():
            raise ValueError("infinite values: replace them, with NaN where there is no data")
        valid = ~np.isnan(found)
        if not valid.all():
            return np.where(valid, as_kept(np.nan_to_num(found)), NO_DATA["float32"]), valid
    return as_kept(found), None


def _header(content: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype, and where the values begin. Raises ValueError for objects, records and damage."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = _READ_HEADER[version](file, _MAX_HEADER_BYTES)
    except Exception as error:
        # The header is a Python literal, whose parser may raise anything on malformed text.
        raise ValueError(f"damaged header: a NumPy array ({error or type(error).__name__})") from None
    if dtype.hasobject or dtype.names is not None:
        raise ValueError("unsupported pixels: objects or records in a NumPy array")
    return shape, dtype, file.tell()


def _layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return height, width and channels."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if len(shape) != 3:
        raise ValueError(f"other dimensions: an array of {len(shape)}; save each image as [height width channels]")
    if _is_channels_first(shape):
        return shape[1], shape[2], shape[0]
    return shape


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    """Return whether the first dimension is the channels, because the last one is too large for that.

    Raises ValueError if that leaves two possibilities, or none.
    """
    first, last = shape[0] <= MAX_CHANNELS, shape[2] <= MAX_CHANNELS
    if (first and last and shape[2] >= min(shape[:2])) or not (first or last):
        raise ValueError(
            f"unclear layout: of {shape}, {'the first or the last' if first else 'no'} dimension may be channels, at "
            f"most {MAX_CHANNELS}; save the array as [height width channels], or the image as TIFF"
        )
    return not last
