"""Recognise the format of an image and read it: as 8-bit pixels, or with all its values and channels."""

from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading, ValueRange
from mae_core.values import FULL, limits_of, to_unit

from . import arrays, deep_png, dicom, heic, jpeg2000, newer, nifti, nrrd, plain, stored, tiff
from .headers import MAX_PIXELS, ImageArray, ImageHeader, ValueArray
from .views import evaluation_view

_VALUES = (".npy", ".dcm", ".dicom", ".nii", ".nii.gz", ".jp2", ".j2k", ".avif", ".jxl", ".nrrd", ".heic", ".heif")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", *_VALUES)
_DEFAULT = Reading()
ANY_SIZE = 2**62
"""In place of max_pixels, for an image whose size was checked before."""
Mask = NDArray[np.bool_]


class Reader(Protocol):
    """A module that reads one format."""

    def recognises(self, content: bytes) -> bool: ...

    def inspect(self, content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
        """Read the header; raise ValueError for what is refused, before pixels are decoded."""
        ...

    def read(self, content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, Mask | None]:
        """Return the values of a frame, not yet upright, and which of them are data; None if all are."""
        ...


_READERS: tuple[Reader, ...] = (stored, tiff, deep_png, dicom, arrays, jpeg2000, newer, nifti, nrrd, heic)  # pyright: ignore[reportAssignmentType] -- modules


def _reader_of(content: bytes) -> Reader | None:
    """Return the reader of a format; None for what `plain` reads, perhaps."""
    return next((reader for reader in _READERS if reader.recognises(content)), None)


def inspect(content: bytes, max_pixels: int = MAX_PIXELS, reading: Reading = _DEFAULT) -> ImageHeader:
    """Read the header without decoding the pixels.

    Raises ValueError with the reason, its kind before the colon, for empty or unknown files, more than `max_pixels`,
    several frames unless `reading` chooses some, and pixels whose meaning is unclear.
    """
    # The order spares photographs the question to every reader.
    reader = None if content.startswith(b"\xff\xd8") else _reader_of(content)
    if reader is None:
        return plain.inspect(content, max_pixels)
    header = reader.inspect(content, max_pixels, reading)
    if header.num_frames > 1 and reading.frames == "one":
        raise ValueError(
            f"several frames: {header.num_frames} pages, frames or slices; choose with --frames first, --frames all, "
            "or --frames N for every N-th"
        )
    return header


def decode(
    content: bytes,
    channels: int,
    orientation: int | None = None,
    scratch: plain.Scratch | None = None,
    notes: list[str] | None = None,
) -> ImageArray:
    """Decode to upright uint8 pixels [height width channels], 1 or 3 channels.

    Gray becomes colour by repetition, and colour becomes gray by luma; alpha is composited over white; 16 bits are
    scaled to 8. Pass `orientation` if the header has been read; otherwise it is read and checked first. With `scratch`,
    the result may be one of its buffers. Raises ValueError with the reason if the image is damaged, or if its values do
    not fit: 16 bits of which a fraction is used, signed numbers, fractions, or other channels.
    """
    if content.startswith(b"\xff\xd8") and orientation is not None:
        return plain.decode(content, channels, orientation, scratch, notes)
    reader = _reader_of(content)
    if reader is None or (reader is tiff and tiff.is_plain(content)):
        if orientation is None:
            orientation = inspect(content).orientation
        return plain.decode(content, channels, orientation, scratch, notes)
    max_pixels = MAX_PIXELS if orientation is None else ANY_SIZE
    return plain.as_channels(_eight_bits(read_values(content, max_pixels=max_pixels)[0]), channels)


def data_of(content: bytes, pixels: ImageArray) -> Mask | None:
    """Return which of the pixels that `decode` made of a file are data, [height width 1]; None if all are."""
    return tiff.plain_data(content, pixels) if tiff.recognises(content) and tiff.is_plain(content) else None


def _eight_bits(values: ValueArray) -> ImageArray:
    if values.shape[2] not in (1, 3) or values.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"other pixels: {values.dtype.name}, channels: {values.shape[2]}, where 8 bits in 1 or 3 are read; "
            "use a dataset or model of such images"
        )
    if values.dtype == np.uint8:
        return values
    if values.max(initial=0) <= FULL["uint16"][1] / 2:
        raise ValueError(
            f"16 bits: values run from {values.min()} to {values.max()}, a fraction of 0 to 65535, and 8 bits would "
            "keep few of them; prepare such images apart, with --range"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_values(
    content: bytes,
    reading: Reading = _DEFAULT,
    frame: int = 0,
    max_pixels: int = MAX_PIXELS,
    notes: list[str] | None = None,
) -> tuple[ValueArray, Mask | None]:
    """Return a frame's upright values [height width channels] as stored, and which of them are data; None if all are.

    Values are uint8, uint16, int16 or float32. Raises ValueError with the reason if the file is damaged or refused. A
    fault that costs no pixel is added to `notes`.
    """
    header, reader = inspect(content, max_pixels, reading), _reader_of(content)
    if header.is_plain or reader is None:
        return plain.decode(content, header.channels, header.orientation, notes=notes), None
    values, valid = reader.read(content, frame, reading)
    if valid is not None and not valid.any():
        raise ValueError("no data: every pixel is marked as having none")
    upright = plain.upright(values, header.orientation)
    return upright, None if valid is None else plain.upright(valid, header.orientation)


def unit_pixels(content: bytes, channels: int, values_range: ValueRange, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Return an image as float32 from 0 to 1 [height width channels], by a dataset's or a model's value range.

    Raises ValueError with the reason if the image is damaged, or has other values or channels.
    """
    reading = values_range.reading
    num_frames = inspect(content, max_pixels, reading).num_frames
    if num_frames > 1 and reading.frames != "first":
        raise ValueError(f"several frames: {num_frames}, where one image is read; give each frame as a file of its own")
    values, valid = read_values(content, reading, max_pixels=max_pixels)
    if values.dtype.name != values_range.dtype:
        raise ValueError(f"other pixels: {values.dtype.name}, where {values_range.dtype} is read")
    if stored.recognises(content):
        low, high = limits_of_stored(content, values_range)
    elif values_range.kind == "voi":
        low, high = own_window(content, values.shape[2])
    else:
        low, high = limits_of(values, values_range, valid)
    if values.shape[2] == 1 and channels == 3:
        values = values.repeat(3, axis=2)
    if len(low) == 1:
        low, high = low.repeat(channels), high.repeat(channels)
    if values.shape[2] != channels or len(low) != channels:
        raise ValueError(f"other pixels: {values.shape[2]} channels, where {channels} are read")
    return to_unit(values, low, high)


def preview(content: bytes, orientation: int | None = None) -> ImageArray:
    """Return an image of any kind as uint8 in three channels, for people: values between their 1st and 99th percentile.

    Of several frames it is the first, and of more than three channels the first three. Raises ValueError if the image
    is damaged, or refused for a reason that no option changes.
    """
    reader = _reader_of(content)
    if reader is None:
        return decode(content, 3, orientation)
    if reader is tiff and tiff.is_plain(content):
        with suppress(ValueError):
            return decode(content, 3, orientation)
    values, valid = read_values(content, Reading(frames="first", fourth_band="band"))
    shown = slice(0, 3 if values.shape[2] >= 3 else 1)
    values, valid = values[:, :, shown], None if valid is None else valid[:, :, shown]
    own = ValueRange(dtype="uint16", kind="percentiles", by="image", percentiles=(1.0, 99.0))
    unit = to_unit(values, *limits_of(values, own, valid))
    return plain.as_channels((unit * 255).round().astype(np.uint8), 3)


def own_window(content: bytes, channels: int) -> stored.Limits:
    """Return the values that become 0 and 1 by a DICOM's own window. Raises ValueError if it has none."""
    if not dicom.recognises(content):
        raise ValueError("no window: only DICOM has one; say --range percentiles 1 99, or --range window CENTER WIDTH")
    low, high = dicom.window_of(content)
    return np.full(channels, low), np.full(channels, high)


def limits_of_stored(content: bytes | memoryview, values_range: ValueRange) -> stored.Limits:
    """Return the values of each channel that become 0 and 1, for values stored in a shard.

    An image's own range is stored with it. Raises ValueError for values of another type, and for damage.
    """
    dtype = stored.layout_of(content)[0]
    if dtype != values_range.dtype:
        raise ValueError(f"other pixels: {dtype}, where {values_range.dtype} is read")
    if values_range.by == "set":
        return np.array(values_range.low, np.float64), np.array(values_range.high, np.float64)
    return stored.limits_of(content) or limits_of(np.moveaxis(stored.planes_of(content), 0, 2), values_range)


def input_view(
    content: bytes,
    channels: int,
    image_px: tuple[int, int],
    values_range: ValueRange | None,
    orientation: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[Any]:
    """Return an image as evaluation sees it: uint8 without a value range, otherwise float32 from 0 to 1.

    Pass `orientation` if the image was checked before, as those of a shard were. Raises ValueError with the reason if
    the image cannot be read, or has more than `max_pixels` and was not checked.
    """
    if values_range is not None:
        limit = max_pixels if orientation is None else ANY_SIZE
        return evaluation_view(unit_pixels(content, channels, values_range, limit), image_px)
    if orientation is None:
        orientation = inspect(content, max_pixels).orientation
    return evaluation_view(decode(content, channels, orientation), image_px)
