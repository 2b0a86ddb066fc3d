"""Lossless storage of values in shards, where files are not kept as they came: filtered bands of rows, with zstd.

    magic "MAEV", version, dtype, channels (uint16), height, width (uint32), flags, 3 bytes of padding
    flag 1: low of each channel, then high of each, as float64: the image's own value range
    a length in bytes (uint32) for each part, and then the parts
    for each band of 64 rows: the lowest byte of its values [channels rows width]
    for each further byte of a value: that byte of all values [channels height width]
    a part is nothing if all bytes are 0, else by zstd, or as it is if zstd saves little

The filter replaces each value by its difference d from the one above it in its band, modulo 2**bits, and that by
2 d, or by -2 d - 1 if it is negative, so that the upper bytes of small differences are 0. float32 counts as uint32.
docs/data.md has sizes and times.
"""

import math
import struct
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from .headers import ImageHeader, ValueArray, check_size

_MAGIC = b"MAEV"
_HEADER = struct.Struct("<4sBBHIIB3x")
_VERSION, _HAS_LIMITS = 1, 1
_DTYPES = ("uint8", "uint16", "int16", "float32")
_LEVEL = 3
BAND_ROWS = 64
_WORTHWHILE = 0.75
"""Largest share of its bytes to which a part must shrink: noise shrinks little, and takes the decoder the longest."""
Limits = tuple[NDArray[np.float64], NDArray[np.float64]]


def recognises(content: bytes | memoryview) -> bool:
    return content[:4] == _MAGIC


class Bands(NamedTuple):
    """Bands of 64 rows that hold some rows of an image, and their folded bytes."""

    rows: list[range]
    """Rows of each band."""
    lowest: list[memoryview]
    """For each band, the part with the lowest byte of its values."""
    further: list[memoryview]
    """For each further byte, the part with that byte of all values of the image."""


def pack(values: ValueArray, limits: Limits | None = None) -> bytes:
    """Store values [height width channels], with the image's own value range if it has one."""
    height, width, channels = values.shape
    code, size = _DTYPES.index(values.dtype.name), values.dtype.itemsize
    planes = np.ascontiguousarray(np.moveaxis(values, 2, 0)).view(f"<u{size}")
    differences = planes.copy()
    for start in range(0, height, BAND_ROWS):
        stop = min(start + BAND_ROWS, height)
        differences[:, start + 1 : stop] -= planes[:, start : stop - 1]
    folded = differences << 1 ^ (differences.view(f"<i{size}") >> (8 * size - 1)).view(differences.dtype)
    in_bytes = folded[..., None].view(np.uint8)
    parts = [_packed(in_bytes[:, start : start + BAND_ROWS, :, 0]) for start in range(0, height, BAND_ROWS)]
    parts += [_packed(in_bytes[..., byte]) for byte in range(1, size)]
    head = _HEADER.pack(_MAGIC, _VERSION, code, channels, height, width, _HAS_LIMITS if limits else 0)
    own = b"" if limits is None else np.concatenate(limits).astype("<f8").tobytes()
    lengths = np.array([len(part) for part in parts], "<u4").tobytes()
    return b"".join((head, own, lengths, *parts))


def _packed(content: NDArray[np.uint8]) -> bytes:
    if not content.any():
        return b""
    content = np.ascontiguousarray(content)
    found = _codec().compress(content.data, asbytes=True)
    return found if len(found) < _WORTHWHILE * content.size else content.tobytes()


def unpacked(part: memoryview, num_values: int) -> NDArray[np.uint8]:
    """Return one byte of each value. Raises ValueError for damage."""
    if not len(part):
        return np.zeros(num_values, np.uint8)
    if len(part) == num_values:
        return np.frombuffer(part, np.uint8)
    try:
        return np.frombuffer(_codec().decompress(part, num_values), np.uint8)
    except (OSError, ValueError) as error:
        raise ValueError(f"damaged image: {str(error).splitlines()[0]}") from None


def bands_of(content: bytes | memoryview, rows: range) -> Bands:
    """Return the bands that hold these rows. Raises ValueError if the parts are not those of the file."""
    dtype, channels, height, _, has_limits = _parsed(content)
    num_bands = -(-height // BAND_ROWS)
    num_parts = num_bands + np.dtype(dtype).itemsize - 1
    at = _HEADER.size + (16 * channels if has_limits else 0)
    if len(content) < at + 4 * num_parts:
        raise ValueError("damaged header: stored values end early")
    lengths = np.frombuffer(content, "<u4", num_parts, at).astype(np.int64)
    ends = at + 4 * num_parts + lengths.cumsum()
    if ends[-1] != len(content):
        raise ValueError("damaged image: stored values end early, or too late")
    view = memoryview(content)
    parts = [view[start:stop] for start, stop in zip((ends - lengths).tolist(), ends.tolist())]
    chosen = range(rows.start // BAND_ROWS, -(-rows.stop // BAND_ROWS))
    return Bands(
        rows=[range(band * BAND_ROWS, min((band + 1) * BAND_ROWS, height)) for band in chosen],
        lowest=[parts[band] for band in chosen],
        further=parts[num_bands:],
    )


def layout_of(content: bytes | memoryview) -> tuple[str, int, int, int]:
    """Return dtype, channels, height and width. Raises ValueError for a damaged header."""
    return _parsed(content)[:4]


def limits_of(content: bytes | memoryview) -> Limits | None:
    """Return low and high of each channel, if the image has a value range of its own."""
    _, channels, _, _, has_limits = _parsed(content)
    if not has_limits:
        return None
    found = np.frombuffer(content, "<f8", 2 * channels, _HEADER.size)
    return found[:channels], found[channels:]


def planes_of(content: bytes | memoryview) -> NDArray[Any]:
    """Return the values as [channels height width]. Raises ValueError if they are damaged."""
    dtype, channels, height, width, _ = _parsed(content)
    size = np.dtype(dtype).itemsize
    in_bytes = np.empty((channels, height, width, size), np.uint8)
    bands = bands_of(content, range(height))
    for rows, part in zip(bands.rows, bands.lowest):
        shape = channels, len(rows), width
        in_bytes[:, rows.start : rows.stop, :, 0] = unpacked(part, math.prod(shape)).reshape(shape)
    for byte, part in enumerate(bands.further, 1):
        in_bytes[..., byte] = unpacked(part, channels * height * width).reshape(channels, height, width)
    folded = in_bytes.view(f"<u{size}")[..., 0]
    found = folded >> 1 ^ -(folded & 1)
    for rows in bands.rows:
        found[:, rows.start : rows.stop] = np.cumsum(found[:, rows.start : rows.stop], axis=1, dtype=found.dtype)
    return found.view(dtype)


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    dtype, channels, height, width, _ = _parsed(content)
    check_size(height, width, channels, max_pixels)
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=channels,
        format="MAEV",
        dtype=dtype,
        is_plain=False,
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    return np.ascontiguousarray(np.moveaxis(planes_of(content), 0, 2)), None


def _parsed(content: bytes | memoryview) -> tuple[str, int, int, int, bool]:
    """Return dtype, channels, height, width, and whether limits follow. Raises ValueError for damage."""
    try:
        magic, version, code, channels, height, width, flags = _HEADER.unpack_from(content)
    except struct.error:
        raise ValueError("damaged header: stored values end early") from None
    if magic != _MAGIC or version != _VERSION or code >= len(_DTYPES):
        raise ValueError(f"damaged header: stored values of version {version}")
    if flags & _HAS_LIMITS and len(content) < _HEADER.size + 16 * channels:
        raise ValueError("damaged header: stored values end early")
    return _DTYPES[code], channels, height, width, bool(flags & _HAS_LIMITS)


@cache
def _codec() -> Any:
    import pyarrow as pa

    return pa.Codec("zstd", _LEVEL)
