"""One image of a source: its name, its metadata, and the location of its bytes."""

import dataclasses
import operator
from dataclasses import dataclass

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What a source may call a split, in any case."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image. Fields are JSON types, in the order by which entries are sorted."""

    name: str
    """Name in the dataset: the path below the source, followed by the position within a file of many images."""
    path: str
    """File that contains it. In a list of URIs it may be a URI."""
    offset: int = -1
    """Offset of its first byte in that file; -1 if the file is the image."""
    group: int = -1
    """Parquet row group; -1 if the file is not Parquet."""
    row: int = -1
    """Row within the row group."""
    num_bytes: int = 0
    """Size in bytes; for a Parquet row, the mean of its row group."""
    split: str = ""
    """One of SPLITS, or empty if the source does not specify it."""
    label: str = ""
    """Name of its class; empty if it has none."""
    is_flat: bool = False
    """Whether the label is certain: stored explicitly, or the name of the only folder that contains the image."""
    version: str = ""
    """Changes with the file that contains it; not part of the dataset's identity. Empty if the listing has none."""
    fault: str = ""
    """Why it must not be read; usually empty."""
    bundle: str = ""
    """Patient, slide or scene: all images of one are kept in one split. Empty if the source or the user names none."""


fields_of = operator.attrgetter(*(field.name for field in dataclasses.fields(Entry)))
"""Equivalent of dataclasses.astuple for an entry, ten times faster because it does not copy."""


def by_folder(path: str) -> tuple[str, str, bool]:
    """Return split, label, and whether the label is certain, of an image at [split/][class/[deeper/]]name."""
    parts = path.split("/")
    split = SPLIT_WORDS.get(parts[0].lower(), "") if len(parts) > 1 else ""
    if split:
        parts.pop(0)
    # JSON cannot hold a class name that is not valid UTF-8.
    label = parts[0].encode("utf-8", "backslashreplace").decode() if len(parts) > 1 else ""
    return split, label, len(parts) == 2
