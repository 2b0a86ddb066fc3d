"""What is known of an image before its pixels are decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ImageArray = NDArray[np.uint8]
ValueArray = NDArray[Any]
"""uint8, uint16, int16 or float32 [height width channels]"""

MAX_PIXELS = 64_000_000
MAX_CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Properties of an image, from its header. Height and width are those after `orientation` is applied."""

    height_px: int
    width_px: int
    orientation: int
    channels: int
    format: str
    dtype: str = "uint8"
    """Kind of the values that `read_values` returns: uint8, uint16, int16 or float32."""
    is_plain: bool = True
    """Whether `plain.decode` reads the file, so that shards keep its bytes."""
    num_frames: int = 1
    """Pages, frames or slices of the file."""
    notes: tuple[str, ...] = ()
    """What is done to the image that its owner may not expect, each in a few words."""

    @property
    def kind(self) -> tuple[str, int]:
        """What all images of a dataset share: the dtype, and the number of channels, 3 standing for 1 and 3."""
        return self.dtype, 3 if self.channels == 1 and self.dtype in ("uint8", "uint16") else self.channels


def check_size(height_px: int, width_px: int, channels: int, max_pixels: int) -> None:
    """Raise ValueError for an image without pixels or channels, or with too many of them."""
    if min(height_px, width_px, channels) < 1:
        raise ValueError(f"no pixels: {width_px} x {height_px}")
    if height_px * width_px > max_pixels:
        raise ValueError(f"too many pixels: {width_px} x {height_px} is more than max_pixels {max_pixels}")
    if channels > MAX_CHANNELS:
        raise ValueError(f"too many channels: {channels} is more than {MAX_CHANNELS}")


def kept_dtype(dtype: str) -> str:
    """Return the dtype that holds all values of another: uint8, uint16, int16 or float32.

    Whole numbers of 32 and 64 bits, and float64, become float32, which is checked to be exact when they are read.
    Raises ValueError for complex numbers and texts.
    """
    kind = np.dtype(dtype)
    if kind in (np.uint8, np.uint16, np.int16, np.float32):
        return kind.name
    if kind == np.bool_:
        return "uint8"
    if kind == np.int8:
        return "int16"
    if kind.kind in "iuf" and kind.itemsize <= 8:
        return "float32"
    raise ValueError(f"unsupported pixels: values of {kind.name}")


def as_kept(values: ValueArray) -> ValueArray:
    """Convert values to `kept_dtype`, in the machine's byte order.

    Raises ValueError if float32 cannot hold a whole number exactly.
    """
    wanted = np.dtype(kept_dtype(values.dtype.newbyteorder("=").name))
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    found = np.ascontiguousarray(values, wanted)
    if values.dtype.kind in "iu" and wanted.kind == "f" and (found.astype(values.dtype) != values).any():
        raise ValueError(f"unsupported pixels: {values.dtype.name} values above 16,777,216, which float32 cannot hold")
    return found


class MissingLibraryError(ValueError):
    """The library that reads a format is not installed."""

    def __init__(self, what: str, library: str, extra: str) -> None:
        super().__init__(f"missing library: {what} needs {library}; pip install '.[{extra}]'")


@contextmanager
def damage_named() -> Iterator[None]:
    """Turn what a reader raises, which may be anything on malformed bytes, into a ValueError of one line."""
    try:
        yield
    except MissingLibraryError:
        raise
    except Exception as error:
        raise ValueError(f"damaged image: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
