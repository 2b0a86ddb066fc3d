"""Recognise images by their first bytes, whatever their name. Whether they can be decoded is another question."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.images.decode import arrays, dicom, heic, nifti, nrrd
from pipelines.storage import Storage, stays_inside
from pipelines.storage.listing import ListedFile

HEAD_BYTES = 1024
"""Enough for the header of a NIfTI volume that gzip has packed."""
_THREADS = 16
# JPEG, PNG, GIF, TIFF and BigTIFF, JPEG 2000, JPEG XL, Photoshop.
_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n", b"8BPS",
)  # fmt: skip
# TIFFs by their first bytes, of which decoders see only a preview.
_RAW = (".cr2", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".pef", ".srw", ".erf", ".3fr", ".iiq", ".mos", ".dcr")
_DICOM_INDEX = "dicomdir"
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with these HEAD_BYTES is an image, of a kind that is read or another."""
    return (
        head.startswith(_STARTS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
        or (head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS)
        or any(reader.recognises(head) for reader in (dicom, arrays, nifti, nrrd, heic))
    )


def is_never_read(path: str) -> bool:
    """Return whether the name is that of a camera's raw file, or of the index of a DICOM medium, whatever is in it."""
    return path.lower().endswith(_RAW) or path.rpartition("/")[2].lower() == _DICOM_INDEX


def images_among(storage: Storage, files: Sequence[ListedFile]) -> list[bool]:
    """Return whether the content of each file is that of an image. Reads their heads in parallel."""
    if not files:
        return []
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda found: _looks(storage, found), files))


def _looks(storage: Storage, found: ListedFile) -> bool:
    is_path = stays_inside(found.path) and not found.path.endswith("/")
    if found.fault or not found.num_bytes or is_never_read(found.path) or not is_path:
        return False
    try:
        return is_image(storage.read_range(found.path, 0, HEAD_BYTES))
    except (FileNotFoundError, PermissionError):
        return False
