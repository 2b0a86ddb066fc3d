"""Masks beside images: `x_mask.png` beside `x.jpg`, and a folder masks/ beside images/. They are no training images."""

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mae_core.errors import UserError
from pipelines.storage import Storage, stays_inside

log = logging.getLogger(__name__)

DOUBLE_SUFFIX = ".nii.gz"
LOSSLESS = (".png", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".nii", ".nii.gz", ".nrrd")
_WORD = r"(?:masks?|seg|segm|segmentations?|segmask|gt|groundtruth|ground_truth|trimap)"
# Words that photographs have in their names, too: their labels have no loss.
_LABEL = r"(?:labels?|labelids|matte|annotations?|anno|instances?|instanceids)"
_MASK = re.compile(
    rf"(?P<base>.+?)[-_. ](?:{_WORD}[-_]?\d*\.(?:nii\.)?[^.]+"
    rf"|{_LABEL}[-_]?\d*\.(?:png|gif|bmp|tiff?|nrrd|nii(?:\.gz)?))",
    re.IGNORECASE,
)
_MASK_FIRST = re.compile(rf"(?:{_WORD}|{_LABEL})[-_. ](?P<base>[^.]*\d[^.]*)\.(?:nii\.gz|[^.]+)", re.IGNORECASE)
_MASK_ALONE = re.compile(rf"(?:{_WORD}|{_LABEL})(?:\.nii)?\.[^.]+", re.IGNORECASE)
_PICTURES = (
    "image", "img", "imaging", "picture", "photo", "scan", "volume", "vol", "raw", "rgb", "orig", "original", "input",
    "flair", "t1", "t1ce", "t1c", "t1gd", "t1n", "t1w", "t2", "t2f", "t2w", "ct", "mr", "mri", "pet", "adc", "dwi",
    "0000",
)  # fmt: skip
"""What the pictures are called beside their masks, such as the sequences of a scanner."""
_MASK_FOLDERS = re.compile(
    r"(?:.+_)?(?:masks?|segs?|segmentations?|segmentationclass|segmentationobject|trimaps?|gt|gtfine|groundtruth"
    r"|ground_truth|labels?|annotations?|labelstr|labelsts)",
    re.IGNORECASE,
)
_IMAGE_FOLDERS = frozenset(("image", "images", "img", "imgs", "jpegimages", "leftimg8bit", "imagestr", "imagests"))


def picture_stems(path: str, *, in_tar: bool = False) -> list[str]:
    """Return the paths, without suffix, that the image of a mask by this name may have; empty for another name.

    `x_mask.png` is one of `x` or of `x_image`, `mask_1.png` of `1` or `image_1`, and `seg.nii.gz` of `image` or `ct` in
    the same folder. In a tar file what follows a dot is a member, which is for the user to choose.
    """
    folder, slash, name = path.rpartition("/")
    if found := _MASK.fullmatch(name):
        base, mark = found["base"], name[len(found["base"])]
        stems = [base, *(f"{base}{mark}{word}" for word in _PICTURES if mark != "." or not in_tar)]
    elif found := _MASK_FIRST.fullmatch(name):
        mark = name[found.start("base") - 1]
        stems = [found["base"], *(f"{word}{mark}{found['base']}" for word in _PICTURES[:2])]
    else:
        stems = list(_PICTURES) if _MASK_ALONE.fullmatch(name) and name.lower().endswith(LOSSLESS) else []
    return [folder + slash + stem for stem in stems]


def stem_of(path: str) -> str:
    """Return a path without the suffix of its name, such as .jpg or .nii.gz."""
    folder, slash, name = path.rpartition("/")
    name = name[: -len(".gz")] if name.lower().endswith(DOUBLE_SUFFIX) else name
    return folder + slash + (name.rpartition(".")[0] or name)


class Twins:
    """Pairs such as x.jpg and x.png: a photograph and its mask, or one picture in two formats.

    Fewer than half are taken, with a warning. The JPEGs of the first images without loss are looked up, all at the end
    and side by side: a store takes a request for each.
    """

    _JPEG = (".jpg", ".jpeg", ".JPG", ".JPEG")
    _LOSSLESS = (".png", ".gif", ".bmp", ".tif", ".tiff", ".npy")
    _MAX_LOOKUPS = 64
    _THREADS = 16

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lossless: list[str] = []

    def note(self, path: str) -> None:
        """Remember an image without loss, unless enough are known."""
        if len(self._lossless) < self._MAX_LOOKUPS and path.lower().endswith(self._LOSSLESS) and stays_inside(path):
            self._lossless.append(path)

    def refuse(self) -> None:
        """Raise UserError if at least half of the images without loss have a JPEG of the same name."""
        with ThreadPoolExecutor(self._THREADS) as pool:
            jpegs = pool.map(self._jpeg_of, self._lossless)
            pairs = [(jpeg, path) for jpeg, path in zip(jpegs, self._lossless) if jpeg]
        if not pairs:
            return
        jpeg, other = pairs[0]
        said = (
            f"{self._storage.uri} has pairs such as {jpeg} and {other}, of which one may be the mask of the other; "
            f"take one of each by --image-member {jpeg[jpeg.rindex('.') :]} or {other[other.rindex('.') :]}, or all by "
            "--image-member any"
        )
        if 2 * len(pairs) >= len(self._lossless):
            raise UserError(said)
        log.warning("%s (%d of %d images without loss are one of a pair)", said, len(pairs), len(self._lossless))

    def _jpeg_of(self, path: str) -> str:
        return next((name for end in self._JPEG if self._storage.exists(name := stem_of(path) + end)), "")


class MaskFolders:
    """Folders of images and of masks, as they are met in a listing: side by side, or one within the other.

    Names of masks beside names of images are enough. Beside or within any other folder the first masks are looked up
    there: each has an image of its name.
    """

    _MAX_LOOKUPS = 4
    _MAX_FOLDERS = 8

    def __init__(self, exists: Callable[[str], bool]) -> None:
        """Take how to tell whether the source has an image of a path without suffix."""
        self._exists = exists
        self._images: dict[str, str] = {}
        self._masks: dict[str, str] = {}
        self._others: dict[str, dict[str, None]] = {}
        self._of_masks: dict[str, list[str]] = {}
        self._folder, self._num_noted = "", 0

    def note(self, path: str) -> None:
        """Note the folders of an image. Of neighbours in a listing the first few are enough."""
        folder = path.rpartition("/")[0]
        self._num_noted = self._num_noted + 1 if folder == self._folder else 1
        self._folder = folder
        if self._num_noted > self._MAX_LOOKUPS:
            return
        for parent, name in _folders(path):
            if name.lower() in _IMAGE_FOLDERS:
                self._images.setdefault(parent, f"{parent}{name}")
            elif _MASK_FOLDERS.fullmatch(re.sub("[- ]", "_", name)):
                self._masks.setdefault(parent, f"{parent}{name}")
                below = self._of_masks.setdefault(parent, [])
                if len(below) < self._MAX_LOOKUPS and path.lower().endswith(LOSSLESS):
                    below.append(path[len(parent) + len(name) + 1 :])
            else:
                others = self._others.setdefault(parent, {})
                if len(others) < self._MAX_FOLDERS:
                    others[name] = None

    def refuse_pairs(self, where: str) -> None:
        """Raise UserError if a folder of masks lies beside one of images, or within it."""
        for parent, masks in self._masks.items():
            images = self._images.get(parent) or self._pictured(parent)
            if images is not None:
                raise UserError(
                    f"{where} has {images or '.'}/ and beside it {masks}/, whose files look like masks of these "
                    "images: they would become training images, and the folders classes; prepare "
                    f"{images or 'the images'} by itself, or use --image-member any if all are images"
                )

    def _pictured(self, parent: str) -> str | None:
        """Return the folder with images by the names of the first masks below `parent`; None if there is none."""
        stems = [stem_of(below) for below in self._of_masks.get(parent, ())]
        for other in (*(f"{parent}{name}/" for name in self._others.get(parent, ())), parent):
            if stems and all(self._exists(other + stem) for stem in stems):
                return other[:-1]
        return None


def folders_of_pictures(folder: str) -> list[str]:
    """Return where the images may lie whose annotations are in this folder, such as images/ for labels/; with a slash.

    Empty for a folder of another name.
    """
    parts = folder.split("/")
    at = next((i for i, part in enumerate(parts) if _MASK_FOLDERS.fullmatch(part)), None)
    if at is None:
        return []
    names = ("images", "Images", "image", "img", "imgs", "JPEGImages")
    return ["/".join([*parts[:at], name, *parts[at + 1 :], ""]) for name in names]


def _folders(path: str) -> Iterator[tuple[str, str]]:
    """Yield the path above each folder, with a slash, and the folder's name."""
    at = 0
    while (end := path.find("/", at)) >= 0:
        yield path[:at], path[at:end]
        at = end + 1
