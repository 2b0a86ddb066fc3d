"""Images with masks for segmentation: folders images/ and masks/ with equal stems, alone or below train/ and val/.

A mask is a PNG of class indices, gray or with a palette, and 255 where a pixel belongs to no class.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mae_core.errors import UserError
from mae_core.segmentation import IGNORE
from pipelines.images.decode import SUFFIXES, inspect, preview
from pipelines.storage import Storage

_NAMES = "classes.txt"
_MOST_NAMED = 5
_INDEX_MODES = ("P", "L", "1")


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by their paths in the storage."""

    image: str
    mask: str

    @property
    def stem(self) -> str:
        """Name without folder and suffix."""
        return PurePosixPath(self.mask).stem


@dataclass(frozen=True)
class Pairs:
    """The pairs that can be decoded, by split, and why others cannot."""

    train: list[Pair]
    val: list[Pair]
    classes: list[str]
    failed: list[dict[str, str]]
    digest: str
    """sha256 over names and contents."""


def read_pairs(storage: Storage, *, val_fraction: float, seed: int) -> Pairs:
    """Find all pairs, decode each once to check it, and split them.

    Without train/ and val/, the pairs whose names have the smallest hash are held out. Raises UserError if a mask or an
    image lacks its partner, a split is empty, a mask is no index PNG, or there are fewer names than classes.
    """
    folders = [name for name in ("train", "val") if storage.is_folder(name)]
    if len(folders) == 1:
        raise UserError(f"{storage.uri} has {folders[0]}/ alone; add the other of train/ and val/, or use neither")
    splits = {name: _paired(storage, f"{name}/") for name in folders} or {"": _paired(storage, "")}
    content, failed, largest = hashlib.sha256(), [], -1
    checked: dict[str, list[Pair]] = {}
    for name, pairs in splits.items():
        checked[name] = []
        for pair in pairs:
            image, mask = storage.read(pair.image), storage.read(pair.mask)
            content.update(f"{pair.image}\0{len(image)}\0{len(mask)}\0".encode() + image + mask)
            try:
                largest = max(largest, _largest_class(pair, image, mask))
                checked[name].append(pair)
            except UserError:
                raise
            except ValueError as error:
                failed.append({"image": pair.image, "reason": str(error)})
    train, val = (checked["train"], checked["val"]) if folders else _held_out(checked[""], val_fraction, seed)
    for name, pairs in (("train", train), ("val", val)):
        if not pairs:
            raise UserError(f"{storage.uri} leaves no pair for {name} ({len(failed)} cannot be decoded); add some")
    if largest < 0:
        raise UserError(f"every pixel of every mask of {storage.uri} is {IGNORE}, which is ignored; label some")
    return Pairs(train, val, _class_names(storage, largest + 1), failed, content.hexdigest())


def read_mask(content: bytes) -> NDArray[np.int64]:
    """Decode a mask to class indices [height width]. Raises ValueError with the reason if it is damaged."""
    header = inspect(content)
    if header.format != "PNG":
        raise ValueError(f"the mask is a {header.format}; a mask must be a PNG, since others change indices")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in _INDEX_MODES:
                raise UserError(
                    f"a mask has {image.mode} pixels instead of class indices; save it with a palette or as 8-bit gray"
                )
            # Without a conversion, a palette image yields its indices.
            return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"damaged mask: {error}") from None


def _largest_class(pair: Pair, image: bytes, mask: bytes) -> int:
    """Check a pair; return the largest class index of its mask, -1 if all is ignored."""
    size_px, indices = preview(image).shape[:2], read_mask(mask)
    if size_px != indices.shape:
        raise UserError(
            f"{pair.image} is {size_px[0]} x {size_px[1]} px but {pair.mask} {indices.shape[0]} x {indices.shape[1]}; "
            "a mask needs its image's size (upright, where EXIF turns the image)"
        )
    labelled = indices[indices != IGNORE]
    return int(labelled.max()) if labelled.size else -1


def _paired(storage: Storage, prefix: str) -> list[Pair]:
    images = _by_stem(storage, f"{prefix}images", SUFFIXES)
    masks = _by_stem(storage, f"{prefix}masks", (".png",))
    if not images:
        raise UserError(
            f"{storage.uri} has no images in {prefix}images/; give a folder with images/ and masks/ whose files have "
            "equal names but for the suffix"
        )
    for what, lacking, other in (
        ("images", images.keys() - masks.keys(), "masks"),
        ("masks", masks.keys() - images.keys(), "images"),
    ):
        if lacking:
            shown = ", ".join(sorted(lacking)[:_MOST_NAMED]) + (" ..." if len(lacking) > _MOST_NAMED else "")
            raise UserError(
                f"{len(lacking)} {what} in {storage.join(prefix + what)} have no partner in {prefix}{other}/: {shown}; "
                "add the partners, or remove these"
            )
    return [Pair(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(storage: Storage, folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, _ in storage.list(folder):
        if path.lower().endswith(tuple(suffixes)):
            stem = str(PurePosixPath(path).relative_to(folder).with_suffix(""))
            if stem in found:
                raise UserError(f"{found[stem]} and {path} of {storage.uri} share a name; rename one of them")
            found[stem] = path
    return found


def _held_out(pairs: list[Pair], val_fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}/{pair.mask}".encode()).digest())
    count = min(len(pairs) - 1, max(1, round(val_fraction * len(pairs))))
    held = set(ranked[:count])
    return [pair for pair in pairs if pair not in held], [pair for pair in pairs if pair in held]


def _class_names(storage: Storage, num_classes: int) -> list[str]:
    if not storage.exists(_NAMES):
        return [str(i) for i in range(num_classes)]
    names = storage.read(_NAMES).decode().splitlines()
    names = [name.strip() for name in names if name.strip()]
    if len(names) < num_classes:
        raise UserError(
            f"{storage.join(_NAMES)} has {len(names)} names but masks have classes up to {num_classes - 1}; "
            f"write {num_classes} lines"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{storage.join(_NAMES)} holds a name twice; give every class its own")
    return names


def batches(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """Yield consecutive runs of at most `size` pairs."""
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
