"""One image of a source: what it is called, what is known of it, and where its bytes lie."""

import dataclasses
import operator
import re
from dataclasses import dataclass

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class Entry:
    """An image. Fields are what JSON can hold, in the order in which entries are sorted."""

    name: str
    """What the dataset will call it: the path below the source, or the place within a file there."""
    path: str
    """The file that holds it; in a list of URIs also a URI."""
    offset: int = -1
    """Of its first byte in that file; -1 where the file is the image."""
    group: int = -1
    """Parquet row group; -1 where the file is none."""
    row: int = -1
    """Row within the row group."""
    num_bytes: int = 0
    """Its size; of a Parquet row the mean of its row group."""
    split: str = ""
    """One of SPLITS, or empty where the source does not say."""
    label: str = ""
    """Name of its class; empty where it has none."""
    is_flat: bool = False
    """Whether the label is sure: written down, or the name of the only folder that the image is in."""
    version: str = ""
    """Changes with the file that holds it; no part of what the dataset is. Empty where no listing says so."""
    fault: str = ""
    """Why it must not be read; mostly empty."""


fields_of = operator.attrgetter(*(field.name for field in dataclasses.fields(Entry)))
"""What dataclasses.astuple says of an entry, without its copies, which cost ten times as much."""


def split_by_name(path: str) -> str:
    """The split that a shard's path speaks of, such as train-00000-of-00008.parquet or val/000.tar; or empty."""
    for part in path.split("/"):
        for word in re.split(r"[-_.]", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def by_folder(path: str) -> tuple[str, str, bool]:
    """Split, label, and whether the label is sure, of an image in folders: [split/][class/[deeper/]]name."""
    parts = path.split("/")
    split = parts.pop(0) if parts[0] in SPLITS and len(parts) > 1 else ""
    # A name that is no UTF-8 can be no class in JSON.
    label = parts[0].encode("utf-8", "backslashreplace").decode() if len(parts) > 1 else ""
    return split, label, len(parts) == 2
