"""OME-TIFF by tifffile: channels are channels, whatever pages they lie in; slices, times and series are frames.

The XML of the first page says which page holds which channel, slice and time. Pages in other files are refused.
"""

import io
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .headers import MissingLibraryError, damage_named
from .tiff_header import TiffHeader

_MAX_XML_BYTES = 2**24
_MAX_SERIES = 1000


@dataclass(frozen=True)
class Planes:
    """Which pages each frame is made of, [frames channels]."""

    pages: NDArray[np.int64]
    size_px: tuple[int, int]


def is_ome(header: TiffHeader) -> bool:
    """Return whether the first page has the XML of OME, and one sample a pixel, so that channels are pages."""
    return b"<OME" in header.page.tags.get("description", b"")[:2000] and header.num_samples == 1


@lru_cache(maxsize=4)
def planes_of(content: bytes) -> Planes:
    """Return the pages of each frame. Raises ValueError if series differ, or pages are missing."""
    try:
        import tifffile
    except ImportError:
        raise MissingLibraryError("OME-TIFF", "tifffile", "deep") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with damage_named(), tifffile.TiffFile(io.BytesIO(content), _multifile=False) as file:
        if len(file.ome_metadata or "") > _MAX_XML_BYTES or b"<!DOCTYPE" in content[: 2**16]:
            raise ValueError("its OME-XML is too large, or declares a document type")
        series = file.series
        if not file.is_ome or len(series) > _MAX_SERIES:
            raise ValueError(f"no OME-TIFF that is understood, with {len(series)} series")
        found = [_pages_of(one) for one in series]
        kinds = {(pages.shape[1], one.keyframe.shape, one.dtype) for pages, one in zip(found, series)}
    if len(kinds) > 1:
        raise ValueError(f"other pages: the {len(found)} series of an OME-TIFF have other channels or sizes; split it")
    ((_, shape, _),) = kinds
    return Planes(np.concatenate(found), (int(shape[0]), int(shape[1])))


def _pages_of(series: Any) -> NDArray[np.int64]:
    """Return the numbers of a series' pages, [frames channels]."""
    axes, shape = series.axes, series.shape
    if axes[-2:] != "YX" or any(page is None for page in series.pages):
        raise ValueError(f"axes {axes}, or pages that are in another file")
    numbers = np.array([page.index for page in series.pages], np.int64).reshape(shape[:-2])
    if "C" not in axes:
        return numbers.reshape(-1, 1)
    numbers = np.moveaxis(numbers, axes.index("C"), -1)
    return numbers.reshape(-1, numbers.shape[-1])


def read_planes(content: bytes, frame: int) -> NDArray[np.generic]:
    """Return the values of a frame, [height width channels]."""
    import tifffile

    planes = planes_of(content)
    with damage_named(), tifffile.TiffFile(io.BytesIO(content), _multifile=False) as file:
        found = [file.pages[int(number)].asarray() for number in planes.pages[frame]]
    return np.stack(found, axis=2)
