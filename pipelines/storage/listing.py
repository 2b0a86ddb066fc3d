"""What a listing says of a file."""

from typing import NamedTuple

from mae_core.errors import UserError

LEAVES = "link that leaves the folder"
FOLDER_LINK = "link to a folder"


class Found(NamedTuple):
    """One file, or what stands where a file should."""

    path: str
    num_bytes: int
    version: str = ""
    """Changes with the content: a store's ETag, a local file's time of change."""
    fault: str = ""
    """Why it must not be read; empty for a file."""


def check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raises UserError for a file that is larger than wanted."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise UserError(f"too many bytes: {num_bytes} is more than {max_bytes}")
