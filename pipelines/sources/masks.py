"""Masks beside images: `x_mask.png` beside `x.jpg`, and a folder masks/ beside images/. They are no training images."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from mae_core.errors import UserError
from pipelines.storage import Storage, stays_inside

DOUBLE_SUFFIX = ".nii.gz"
_MASK = re.compile(
    r"(?P<base>.+?)[-_. ](?:"
    r"(?:masks?|seg|segm|segmentations?|segmask|gt|groundtruth|ground_truth|trimap)\d*\.(?:nii\.)?[^.]+"
    # Words that photographs have in their names, too: their labels have no loss.
    r"|(?:labels?|labelids|matte|annotations?|anno|instances?|instanceids)\d*\.(?:png|gif|bmp|tiff?|nii(?:\.gz)?))",
    re.IGNORECASE,
)
_MASK_FOLDERS = frozenset((
    "mask", "masks", "label", "labels", "seg", "segs", "segmentation", "segmentations", "annotation", "annotations",
    "gt", "ground_truth", "groundtruth", "segmentationclass", "segmentationobject", "trimaps", "gtfine", "labelstr",
    "labelsts",
))  # fmt: skip
_IMAGE_FOLDERS = frozenset(("image", "images", "img", "imgs", "jpegimages", "leftimg8bit", "imagestr", "imagests"))


def masked_stem(path: str) -> str:
    """Return the path, without its suffix, of the image that a mask by this name belongs to; empty for another name."""
    folder, slash, name = path.rpartition("/")
    found = _MASK.fullmatch(name)
    return f"{folder}{slash}{found['base']}" if found else ""


def stem_of(path: str) -> str:
    """Return a path without the suffix of its name, such as .jpg or .nii.gz."""
    folder, slash, name = path.rpartition("/")
    name = name[: -len(".gz")] if name.lower().endswith(DOUBLE_SUFFIX) else name
    return folder + slash + (name.rpartition(".")[0] or name)


class Twins:
    """Pairs such as x.jpg and x.png: a photograph and its mask, or one picture in two formats.

    The JPEGs of the first images without loss are looked up, all at the end and side by side: a store takes a request
    for each.
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
        if pairs and 2 * len(pairs) >= len(self._lossless):
            jpeg, other = pairs[0]
            end = other[other.rindex(".") :]
            raise UserError(
                f"{self._storage.uri} has pairs such as {jpeg} and {other}, of which one may be the mask of the other; "
                f"take one of each by --image-member {jpeg[jpeg.rindex('.') :]} or {end}, or all by --image-member any"
            )

    def _jpeg_of(self, path: str) -> str:
        return next((name for end in self._JPEG if self._storage.exists(name := stem_of(path) + end)), "")


class MaskFolders:
    """Folders of images and of masks with the same parent, as they are met in a listing."""

    def __init__(self) -> None:
        self._images: dict[str, str] = {}
        self._masks: dict[str, str] = {}

    def note(self, path: str) -> None:
        """Note the folders of an image."""
        for parent, name in _folders(path):
            if name.lower() in _MASK_FOLDERS:
                self._masks.setdefault(parent, f"{parent}{name}")
            elif name.lower() in _IMAGE_FOLDERS:
                self._images.setdefault(parent, f"{parent}{name}")

    def refuse_pairs(self, where: str) -> None:
        """Raise UserError if a folder of masks lies beside one of images."""
        for parent, masks in self._masks.items():
            if parent in self._images:
                images = self._images[parent]
                raise UserError(
                    f"{where} has {images}/ and beside it {masks}/, whose files look like masks of these images: they "
                    f"would become training images, and the folders classes; prepare {images} by itself, or use "
                    "--image-member any if all are images"
                )


def _folders(path: str) -> Iterator[tuple[str, str]]:
    """Yield the path above each folder, with a slash, and the folder's name."""
    at = 0
    while (end := path.find("/", at)) >= 0:
        yield path[:at], path[at:end]
        at = end + 1
