"""NRRD (`.nrrd`) by pynrrd: slices of a volume along an axis of the patient, or one image.

Volumes lie as those of `nifti` do. A volume that names no space is taken as ITK takes it: its first axis leads to the
left of the patient, the second to the back, the third to the head. Data in another file are refused.
"""

import io
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.normalization import Reading

from .headers import ImageHeader, MissingLibraryError, ValueArray, check_size, damage_named, kept_dtype
from .nifti import MAX_VOLUME_BYTES, slice_of, slices_of

# From the axes of each space to [right front up].
_SPACES = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
_TYPES = {
    "int8": ("signed char", "int8", "int8_t"),
    "uint8": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "int16": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "uint16": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "int32": ("int", "signed int", "int32", "int32_t"),
    "uint32": ("uint", "unsigned int", "uint32", "uint32_t"),
    "float32": ("float",),
    "float64": ("double",),
}
_MAX_HEADER_BYTES = 2**16
_SCALAR_KINDS = ("domain", "space", "none", "???")
_SKIPS = ("line skip", "lineskip", "byte skip", "byteskip")


def recognises(content: bytes) -> bool:
    return content[:7] == b"NRRD000"


def inspect(content: bytes, max_pixels: int, reading: Reading) -> ImageHeader:
    header, _ = _header(content)
    shape, dtype = _shape(header), _dtype(header)
    num_bytes = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if num_bytes > MAX_VOLUME_BYTES:
        raise ValueError(f"too many pixels: a volume of {num_bytes} bytes is more than {MAX_VOLUME_BYTES}")
    width, height, num_slices = *shape[:2], 1
    if len(shape) == 3:
        height, width, num_slices = slices_of(_affine(header), shape, reading.axis)
    check_size(height, width, 1, max_pixels)
    return ImageHeader(
        height_px=height,
        width_px=width,
        orientation=1,
        channels=1,
        format="NRRD",
        dtype=kept_dtype(dtype.name),
        is_plain=False,
        num_frames=num_slices,
        notes=("no space in the file, taken as stored",) if len(shape) == 3 and "space" not in header else (),
    )


def read(content: bytes, frame: int, reading: Reading) -> tuple[ValueArray, NDArray[np.bool_] | None]:
    volume = _volume(content)
    if volume.ndim == 2:
        # As if it were the only slice: `slice_of` turns it back.
        return slice_of(volume[::-1, ::-1, None, None], 0, "axial")
    return slice_of(volume[..., None], frame, reading.axis)


@lru_cache(maxsize=4)
def _header(content: bytes) -> tuple[Any, int]:
    """Return the header's fields and the position of the data. Raises ValueError for data in another file."""
    try:
        import nrrd
    except ImportError:
        raise MissingLibraryError("NRRD", "pynrrd", "medical") from None
    file = io.BytesIO(content[:_MAX_HEADER_BYTES])
    try:
        header = nrrd.read_header(file)
    except Exception as error:
        raise ValueError(f"damaged header: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
    if {"data file", "datafile"} & set(header):
        raise ValueError("external data: an NRRD whose data are in another file; save it as one .nrrd file")
    if header.get("encoding") not in ("raw", "gzip", "gz") or set(_SKIPS) & set(header):
        raise ValueError(f"unsupported pixels: NRRD of encoding {header.get('encoding')}, or with bytes to skip")
    return header, file.tell()


def _shape(header: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in header.get("sizes", ()))
    kinds = header.get("kinds") or ["domain"] * len(shape)
    if len(shape) not in (2, 3) or min(shape) < 1 or any(kind not in _SCALAR_KINDS for kind in kinds):
        raise ValueError(
            f"other dimensions: NRRD of {shape}, axes {' '.join(kinds)}; give images or volumes of scalars"
        )
    return shape


def _dtype(header: Any) -> np.dtype[Any]:
    kind = str(header.get("type", "")).lower()
    found = next((name for name, names in _TYPES.items() if kind in names), "")
    if not found:
        raise ValueError(f"unsupported pixels: NRRD of type {kind}")
    return np.dtype(found)


def _affine(header: Any) -> NDArray[Any]:
    """Return the affine from the axes of the volume to [right front up]."""
    space = header.get("space")
    signs = _SPACES.get(str(space).lower()) if space is not None else (-1, -1, 1)
    if signs is None:
        raise ValueError(f"unclear orientation: NRRD of space {space}; save it as left-posterior-superior")
    directions = np.asarray(header.get("space directions", np.eye(3)), np.float64)
    if directions.shape != (3, 3) or not np.isfinite(directions).all():
        raise ValueError("damaged header: NRRD whose axes have no direction")
    affine = np.eye(4)
    affine[:3, :3] = (directions * np.array(signs)).T
    return affine


@lru_cache(maxsize=1)
def _volume(content: bytes) -> NDArray[Any]:
    """Return a volume [right front up], or an image [width height] as stored."""
    import nibabel
    import nrrd

    header, at = _header(content)
    shape, dtype = _shape(header), _dtype(header)
    needed = int(np.prod(shape)) * dtype.itemsize
    with damage_named():
        data = content[at:]
        if header["encoding"] != "raw":
            # More than needed is never unpacked, whatever the file holds.
            data = zlib.decompressobj(31).decompress(data, needed)
        if len(data) < needed:
            raise ValueError(f"{len(data)} bytes of values, where the header says {needed}")
        found = nrrd.read_data({**header, "encoding": "raw"}, io.BytesIO(data[:needed]))
        if len(shape) == 2:
            return found
        turned = nibabel.orientations.apply_orientation(found, nibabel.io_orientation(_affine(header)))
        return np.asarray(turned)
