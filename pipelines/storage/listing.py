"""Entries of a file listing."""

from typing import NamedTuple

from mae_core.errors import UserError

LEAVES = "link that leaves the folder"
FOLDER_LINK = "link to a folder"


class ListedFile(NamedTuple):
    """A file in a listing, or something that is not a readable file."""

    path: str
    num_bytes: int
    version: str = ""
    """Changes with the content: an object's ETag, a local file's modification time."""
    fault: str = ""
    """Why it must not be read; empty for a readable file."""


def check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raise UserError if a file is larger than `max_bytes`."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise UserError(f"too many bytes: {num_bytes} is more than {max_bytes}; cut it into smaller files")
