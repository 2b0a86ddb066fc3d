"""NIfTI (`.nii`, `.nii.gz`) by nibabel: slices of a volume along an axis of the patient.

Conventions: the volume is turned to the nearest canonical orientation first, so that slices of all scanners lie alike.
Axial slices have the front up and the patient's right on the left, as radiologists see them; coronal ones the head up
and the right on the left; sagittal ones the head up and the front on the left. A slope of 0 means no scaling.
"""

import gzip
import io
import logging
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading
from mae_core.values import NO_DATA

from .headers import ImageHeader, MissingLibraryError, ValueArray, as_kept, check_size, damage_named, kept_dtype

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
MAX_VOLUME_BYTES = 4 * 2**30
_HEAD_BYTES = 544


def recognises(content: bytes) -> bool:
    head = _head(content) if content[:2] == b"\x1f\x8b" else content[:_HEAD_BYTES]
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    header = _header(content)
    shape = _shape(header)
    num_bytes = int(np.prod(shape, dtype=np.float64)) * header.get_data_dtype().itemsize
    if num_bytes > MAX_VOLUME_BYTES:
        raise ValueError(f"too many pixels: a volume of {num_bytes} bytes is more than {MAX_VOLUME_BYTES}")
    height, width, num_slices = slices_of(header.get_best_affine(), shape, reading.axis)
    check_size(height, width, 1, max_pixels)
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=1,
        format="NIfTI",
        dtype=_kept(header),
        is_plain=False,
        num_frames=num_slices * shape[3],
        notes=("qform turns the volume otherwise than sform, which is taken",) if _disagrees(header) else (),
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    return slice_of(_volume(content), frame, reading.axis)


def slice_of(volume: NDArray[Any], frame: int, axis: str) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    """Return a slice of a volume [right front up time] as it is shown, and which of its values are finite."""
    along = _AXES[axis]
    time, number = divmod(frame, volume.shape[along])
    # From [right front up] to [rows columns] with the larger coordinate first in both directions.
    found = np.take(volume[..., time], number, axis=along).T[::-1, ::-1]
    found = np.ascontiguousarray(found)[:, :, None]
    if found.dtype.kind == "f":
        valid = np.isfinite(found)
        if not valid.all():
            return np.where(valid, as_kept(np.nan_to_num(found)), NO_DATA["float32"]), valid
    return as_kept(found), None


def _head(content: bytes) -> bytes:
    """Return the first bytes of a gzip file; empty if it is damaged."""
    try:
        return zlib.decompressobj(31).decompress(content[:65536], _HEAD_BYTES)
    except zlib.error:
        return b""


def _header(content: bytes) -> Any:
    try:
        import nibabel
    except ImportError:
        raise MissingLibraryError("NIfTI", "nibabel", "medical") from None
    # Its warnings about malformed headers would drown the reason that is raised.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    head = _head(content) if content[:2] == b"\x1f\x8b" else content[:_HEAD_BYTES]
    kind = nibabel.Nifti1Header if head[344:348] == b"n+1\0" else nibabel.Nifti2Header
    try:
        return kind.from_fileobj(io.BytesIO(head), check=False)
    except Exception as error:
        raise ValueError(f"damaged header: {error or type(error).__name__}") from None


def _shape(header: Any) -> tuple[int, int, int, int]:
    """Return the volume's shape and the number of volumes."""
    try:
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
    except Exception as error:
        raise ValueError(f"damaged header: {error or type(error).__name__}") from None
    if dtype.names is not None or dtype.kind == "c":
        raise ValueError(f"unsupported pixels: NIfTI of {dtype}")
    if len(shape) < 3 or any(size != 1 for size in shape[4:]) or min(shape) < 1:
        raise ValueError(f"other dimensions: NIfTI of {shape}; give volumes of three dimensions, or four with time")
    return (*shape[:3], shape[3] if len(shape) > 3 else 1)


def slices_of(affine: NDArray[Any], shape: tuple[int, ...], axis: str) -> tuple[int, int, int]:
    """Return height, width and number of the slices of a volume whose affine leads to [right front up]."""
    import nibabel

    turned = nibabel.io_orientation(affine)
    sizes = [0, 0, 0]
    for place, (to, _) in enumerate(turned):
        if np.isnan(to):
            raise ValueError("damaged header: a volume whose axes have no direction")
        sizes[int(to)] = shape[place]
    across, down = [place for place in range(3) if place != _AXES[axis]]
    return sizes[down], sizes[across], sizes[_AXES[axis]]


def _disagrees(header: Any) -> bool:
    """Return whether the file has two orientations that turn the volume differently."""
    import nibabel

    (sform, s_code), (qform, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    if not (s_code and q_code) or qform is None:
        return False
    return not np.array_equal(nibabel.io_orientation(sform), nibabel.io_orientation(qform), equal_nan=True)


def _kept(header: Any) -> str:
    """Return the dtype of the values after scaling."""
    slope, intercept = header.get_slope_inter()
    if slope is None or (slope, intercept) == (1, 0):
        return kept_dtype(header.get_data_dtype().newbyteorder("=").name)
    return "float32"


@lru_cache(maxsize=1)
def _volume(content: bytes) -> NDArray[Any]:
    """Return the scaled volume [right front up time] in canonical orientation."""
    import nibabel

    header = _header(content)
    shape = _shape(header)
    needed = int(header.get_data_offset()) + int(np.prod(shape)) * header.get_data_dtype().itemsize
    with damage_named():
        if content[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(needed)
        kind = nibabel.Nifti1Image if content[344:348] == b"n+1\0" else nibabel.Nifti2Image
        image = nibabel.as_closest_canonical(kind.from_bytes(content))
        return np.asarray(image.dataobj).reshape(*image.shape[:3], -1)
