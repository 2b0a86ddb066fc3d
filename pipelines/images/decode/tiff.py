"""TIFF, GeoTIFF and cloud-optimised GeoTIFF by tifffile, where Pillow would lose channels or bits.

Conventions: pages of full resolution only, never an overview; white-is-zero is turned to black-is-zero; a band that is
declared as alpha is composited over white if it is a mask, and otherwise `Reading.fourth_band` decides; pixels of
GDAL's nodata value, and NaN, have no data.
"""

import io
import logging

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading
from mae_core.values import NO_DATA

from . import ome, plain
from .headers import (
    ImageArray,
    ImageHeader,
    MissingLibraryError,
    ValueArray,
    as_kept,
    check_size,
    damage_named,
    kept_dtype,
)
from .tiff_header import (
    CIELAB,
    CMYK,
    PALETTE,
    SIGNATURES,
    UNASSOCIATED,
    WHITE_IS_ZERO,
    YCBCR,
    TiffHeader,
    read_tiff_header,
)

# Compression of Aperio's slides. Whether their YCbCr becomes RGB depends on the reader.
_APERIO_YCBCR = 33003


def recognises(content: bytes) -> bool:
    return content[:4] in SIGNATURES


def is_plain(content: bytes) -> bool:
    """Return whether `plain.decode` reads the file, if nothing else is asked for."""
    header = read_tiff_header(content)
    return header.is_plain and header.num_frames == 1 and not ome.is_ome(header)


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    header = read_tiff_header(content)
    height, width = header.size_px
    palette = header.page.tags.get("palette", ())
    if header.photometric == PALETTE and 0 < max(palette, default=0) < 256:
        raise ValueError("unsupported pixels: a TIFF palette of 8 bits, where it has 16; convert it to RGB")
    notes = []
    if header.num_overviews:
        notes.append("overviews left out")
    if header.page.first("compression", 1) == _APERIO_YCBCR:
        raise ValueError("unsupported pixels: a slide of JPEG 2000 in YCbCr, of which readers differ; convert it")
    planes = ome.planes_of(content) if ome.is_ome(header) else None
    if header.photometric == WHITE_IS_ZERO:
        notes.append("white is zero, inverted")
    keeps_band = header.alpha == UNASSOCIATED and reading.fourth_band == "band"
    if header.alpha and not keeps_band:
        notes.append("alpha composited over white")
    is_asked = header.alpha == UNASSOCIATED and reading.fourth_band != "ask"
    if planes is None and header.is_plain and header.num_frames == 1 and not is_asked and header.page.number == 0:
        found = plain.inspect(content, max_pixels, header)
        return ImageHeader(**{**vars(found), "notes": tuple(notes)})
    channels = header.num_samples if keeps_band else header.num_colours
    num_frames = header.num_frames
    if planes is not None:
        num_frames, channels = planes.pages.shape
        if planes.size_px != (height, width):
            raise ValueError(f"damaged header: OME-TIFF of {planes.size_px} in pages of {height} x {width}")
    check_size(height, width, channels, max_pixels)
    if header.photometric in (PALETTE, CMYK, YCBCR, CIELAB):
        raise ValueError(
            f"unsupported pixels: TIFF photometric interpretation {header.photometric} in {header.bits} bits and "
            f"{header.num_samples} samples, {header.num_frames} pages; convert it to gray or RGB"
        )
    dtype = kept_dtype(header.dtype if header.bits >= 8 else "uint8")
    if header.photometric == WHITE_IS_ZERO and dtype == "float32":
        raise ValueError("unsupported pixels: white is zero, but the largest value is unknown; invert them")
    if header.nodata is not None:
        notes.append("pixels without data")
    orientation = header.page.first("orientation", 1)
    orientation = orientation if 1 <= orientation <= 8 else 1
    if orientation >= 5:
        height, width = width, height
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=orientation,
        channels=channels,
        format="TIFF",
        dtype=dtype,
        is_plain=False,
        num_frames=num_frames,
        notes=tuple(notes),
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    header = read_tiff_header(content)
    is_ome = ome.is_ome(header)
    if not is_ome and frame < len(header.pages) and header.pages[frame].layout != header.page.layout:
        raise ValueError(f"other pages: page {frame} has other pixels or another size than the first; split the file")
    stored = ome.read_planes(content, frame) if is_ome else _samples(content, header, frame)
    if stored.dtype == np.bool_:
        stored = stored.astype(np.uint8)
    if stored.dtype.kind == "f":
        if np.isinf(stored).any():
            raise ValueError("infinite values: replace them, or mark them as GDAL's nodata")
        valid = ~np.isnan(stored)
    else:
        valid = np.ones(stored.shape, bool)
    if header.nodata is not None:
        valid &= stored != header.nodata
    if header.photometric == WHITE_IS_ZERO:
        stored = _inverted(stored, header.bits)
    if header.bits < 8:
        stored = np.asarray(stored, np.uint8) * np.uint8(255 // (2**header.bits - 1))
    values = as_kept(np.where(valid, stored, 0) if stored.dtype.kind == "f" else stored)
    if header.alpha and not (header.alpha == UNASSOCIATED and reading.fourth_band == "band"):
        values, valid = _composited(values, header, reading), valid[:, :, :-1]
    if valid.all():
        return values, None
    return np.where(valid, values, np.array(NO_DATA[values.dtype.name], values.dtype)), valid


def plain_data(content: bytes, pixels: ImageArray) -> NDArray[np.bool_] | None:
    """Return which pixels of a file that `plain` decodes are data, [height width 1]; None if all are.

    Those of GDAL's nodata value are none, and those of which alpha is 0.
    """
    header = read_tiff_header(content)
    if header.alpha:
        with plain.opened(content, "damaged image") as image:
            return np.asarray(image.convert("RGBA"))[:, :, 3:] > 0
    if header.nodata is None or header.photometric == PALETTE:
        return None
    nodata = 255 - header.nodata if header.photometric == WHITE_IS_ZERO else header.nodata
    return (pixels != nodata).any(axis=2, keepdims=True)


def _samples(content: bytes, header: TiffHeader, frame: int) -> NDArray[np.generic]:
    """Return the samples of a frame as they are stored, [height width samples]."""
    try:
        import tifffile
    except ImportError:
        raise MissingLibraryError("a TIFF of these pixels", "tifffile", "deep") from None
    # Its warnings about malformed tags would drown the reason that is raised.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    height, width = header.size_px
    with damage_named():
        try:
            with tifffile.TiffFile(io.BytesIO(content)) as file:
                if len(header.pages) == 1 and header.num_frames > 1:
                    # ImageJ: the images follow each other behind one page.
                    found = file.series[0].asarray().reshape(header.num_frames, height, width, -1)[frame]
                else:
                    page = file.pages[header.pages[frame].number]
                    found, axes = page.asarray(), page.axes
                    if axes == "SYX":
                        found = np.moveaxis(found, 0, 2)
        except Exception as error:
            if "imagecodecs" in str(error):
                raise MissingLibraryError("this compression of TIFF", "imagecodecs", "deep") from None
            raise
    if found.size != height * width * header.num_samples:
        raise ValueError(f"damaged image: {found.shape} values, where the header says {height} x {width}")
    return found.reshape(height, width, header.num_samples)


def _inverted(stored: ValueArray, bits: int) -> ValueArray:
    """Turn white-is-zero to black-is-zero: the largest value becomes the smallest."""
    if stored.dtype.kind == "i":
        return ~stored
    return np.array(2**bits - 1, stored.dtype) - stored


def _composited(values: ValueArray, header: TiffHeader, reading: Reading) -> ValueArray:
    """Composite over white, by the last band."""
    colours, alpha = values[:, :, :-1], values[:, :, -1:]
    if header.alpha == UNASSOCIATED and reading.fourth_band == "ask":
        plain.refuse_unclear_alpha(alpha)
    if values.dtype.kind == "f" or values.dtype == np.int16:
        raise ValueError(f"unsupported pixels: alpha beside {values.dtype.name}; say --fourth-band band, or remove it")
    white = int(np.iinfo(values.dtype).max)
    shares = alpha.astype(np.int64)
    if header.alpha == UNASSOCIATED:
        found = (colours.astype(np.int64) * shares + white * (white - shares) + white // 2) // white
    else:
        found = np.minimum(colours.astype(np.int64) + white - shares, white)
    return found.astype(values.dtype)
