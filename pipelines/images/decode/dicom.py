"""DICOM by pydicom, the values as a modality means them.

Conventions: the modality's rescaling or lookup table is applied; MONOCHROME1, whose lowest value is white, is turned so
that higher values are brighter; YBR becomes RGB; pixels of the padding value have no data. The window of interest (VOI)
is applied only where a value range asks for it, since it belongs to a display.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading
from mae_core.values import NO_DATA

from .headers import ImageHeader, MissingLibraryError, ValueArray, as_kept, check_size, damage_named

_GRAY, _COLOUR = (
    ("MONOCHROME1", "MONOCHROME2"),
    ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420"),
)
_DEFLATED = "1.2.840.10008.1.2.1.99"


def recognises(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    try:
        return _inspect(_tags(content), max_pixels)
    except ValueError:
        raise
    except Exception as error:
        # Values of damaged tags are of any type.
        raise ValueError(f"damaged header: {error or type(error).__name__}") from None


def _inspect(tags: Any, max_pixels: int) -> ImageHeader:
    height, width = int(tags.get("Rows", 0)), int(tags.get("Columns", 0))
    photometric, samples = str(tags.get("PhotometricInterpretation", "")), int(tags.get("SamplesPerPixel", 1))
    check_size(height, width, samples, max_pixels)
    if (
        (samples == 1 and photometric not in _GRAY)
        or (samples == 3 and photometric not in _COLOUR)
        or samples not in (1, 3)
    ):
        raise ValueError(
            f"unsupported pixels: DICOM {photometric or 'without photometric interpretation'}, {samples} samples"
        )
    bits = int(tags.get("BitsAllocated", 0))
    stored = int(tags.get("BitsStored", bits))
    if not 1 <= stored <= bits or int(tags.get("HighBit", stored - 1)) != stored - 1:
        raise ValueError(f"unsupported pixels: DICOM of {stored} bits whose highest is bit {tags.get('HighBit')}")
    if not all(slope for slope, _ in _rescalings(tags)):
        raise ValueError("damaged header: DICOM whose RescaleSlope is 0")
    if bits not in (8, 16, 32) or (samples == 3 and bits != 8):
        raise ValueError(f"unsupported pixels: DICOM {photometric} of {bits} bits")
    notes = ["MONOCHROME1, inverted"] if photometric == "MONOCHROME1" else []
    if "PixelPaddingValue" in tags:
        notes.append("pixels without data")
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=samples,
        format="DICOM",
        dtype="uint8" if samples == 3 else _kept(tags),
        is_plain=False,
        num_frames=max(1, int(tags.get("NumberOfFrames", 1) or 1)),
        notes=tuple(notes),
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    try:
        return _read(content, frame)
    except ValueError:
        raise
    except Exception as error:
        # Tags are parsed when they are asked for, and damaged ones raise anything.
        raise ValueError(f"damaged image: {str(error).partition(chr(10))[0] or type(error).__name__}") from None


def _read(content: bytes, frame: int) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    from pydicom.pixels import apply_modality_lut, pixel_array

    tags = _tags(content)
    with damage_named():
        try:
            stored = pixel_array(io.BytesIO(content), index=frame)
        except Exception as error:
            if "missing dependencies" in str(error) or "additional" in str(error):
                raise MissingLibraryError("this compression of DICOM", "python-gdcm", "medical") from None
            raise
        is_gray = int(tags.get("SamplesPerPixel", 1)) == 1
        values = np.asarray(apply_modality_lut(stored, _of_frame(tags, frame))) if is_gray else stored
    if stored.dtype.kind == "f":
        raise ValueError("unsupported pixels: DICOM of fractions")
    if values.ndim == 3:
        return as_kept(values), None
    valid = _valid(stored, tags)
    if tags.PhotometricInterpretation == "MONOCHROME1":
        low, high = _possible(tags, [_rescaling_of(tags, frame)])
        values = (low + high) - values
    dtype = _kept(tags)
    kept = np.ascontiguousarray(values.astype(dtype)[:, :, None])
    if valid is None or valid.all():
        return kept, None
    mask = valid[:, :, None]
    return np.where(mask, kept, np.array(NO_DATA[dtype], dtype)), mask


def window_of(content: bytes) -> tuple[float, float]:
    """Return the values that become 0 and 1 by the file's first window of interest. Raises ValueError without one."""
    tags = _tags(content)
    function = str(tags.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if "WindowCenter" not in tags or "WindowWidth" not in tags or function not in ("LINEAR", "LINEAR_EXACT"):
        said = f"of function {function}" if function not in ("LINEAR", "LINEAR_EXACT") else "in the file"
        raise ValueError(f"no window {said}: say --range window CENTER WIDTH, or --range percentiles 1 99")
    if len(_rescalings(tags)) > 1:
        raise ValueError("no window that all frames share: say --range percentiles 1 99")
    center, width = (float(np.atleast_1d(tags[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    # PS3.3 C.11.2.1.2.1: LINEAR counts the width from the first to the last value.
    low, high = center - width / 2, center + width / 2
    if function == "LINEAR":
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    if tags.get("PhotometricInterpretation") == "MONOCHROME1":
        total = sum(_possible(tags))
        low, high = total - high, total - low
    return low, high


@lru_cache(maxsize=4)
def _tags(content: bytes) -> Any:
    """Return the data set without pixels."""
    try:
        import pydicom
    except ImportError:
        raise MissingLibraryError("DICOM", "pydicom", "medical") from None
    try:
        found = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        if str(found.file_meta.get("TransferSyntaxUID", "")) == _DEFLATED:
            raise ValueError("unsupported pixels: deflated DICOM, which may unpack to any size")
        return found
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"damaged header: {error or type(error).__name__}") from None


def _possible(tags: Any, rescalings: Sequence[tuple[float, float]] = ()) -> tuple[float, float]:
    """Return the smallest and the largest value that the header allows, as the modality means them.

    `rescalings` are those of some frames, instead of all.
    """
    table = tags.get("ModalityLUTSequence")
    if table:
        return 0.0, float(2 ** int(table[0].LUTDescriptor[2]) - 1)
    bits = int(tags.get("BitsStored", tags.BitsAllocated))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if tags.get("PixelRepresentation") else (0, 2**bits - 1)
    ends = [
        stored * slope + intercept for slope, intercept in rescalings or _rescalings(tags) for stored in (low, high)
    ]
    return min(ends), max(ends)


def _rescalings(tags: Any) -> Sequence[tuple[float, float]]:
    """Return slope and intercept of every frame; of one, if all have the same."""
    groups = tags.get("PerFrameFunctionalGroupsSequence") or ()
    return list(dict.fromkeys(_rescaling_of(tags, frame) for frame in range(max(1, len(groups)))))


def _rescaling_of(tags: Any, frame: int) -> tuple[float, float]:
    of_frame = _of_frame(tags, frame)
    slope, intercept = of_frame.get("RescaleSlope"), of_frame.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _of_frame(tags: Any, frame: int) -> Any:
    """Return the data set that has the rescaling of a frame: its functional group, the shared one, or the file's own.

    PS3.3 C.7.6.16.2.9: images of several frames (enhanced CT, MR and PET) rescale each frame by itself.
    """
    groups = tags.get("PerFrameFunctionalGroupsSequence") or ()
    shared = tags.get("SharedFunctionalGroupsSequence") or ()
    for group in (*groups[frame : frame + 1], *shared[:1]):
        if found := group.get("PixelValueTransformationSequence"):
            return found[0]
    return tags


def _kept(tags: Any) -> str:
    """Return the smallest dtype that holds every value that the header allows."""
    low, high = _possible(tags)
    if not all(number.is_integer() for rescaling in _rescalings(tags) for number in rescaling):
        return "float32"
    for dtype in ("uint8", "uint16", "int16"):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return "float32"


def _valid(stored: NDArray[Any], tags: Any) -> NDArray[np.bool_] | None:
    """Return which pixels are no padding; None if the file knows of none."""
    if "PixelPaddingValue" not in tags:
        return None
    first = int(tags.PixelPaddingValue)
    last = int(tags.get("PixelPaddingRangeLimit", first))
    return (stored < min(first, last)) | (stored > max(first, last))
