"""Local folders: listings that never leave the root, and atomic writes."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import IO

from pipelines.storage.listing import FOLDER_LINK, LEAVES, ListedFile


def walk(root: str, start: str) -> Iterator[ListedFile]:
    """Yield everything below `start` that is neither a folder nor hidden, with paths relative to `root`.

    Links to folders are reported, not followed, so link loops cannot occur.
    """
    for folder, folders, names in os.walk(start, onerror=_raise_unless_missing):
        below = os.path.relpath(folder, root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(folder, name).is_symlink():
                yield ListedFile(os.path.normpath(f"{below}/{name}"), 0, fault=FOLDER_LINK)
        for name in names:
            if not name.startswith("."):
                with suppress(FileNotFoundError):  # deleted since the folder was listed
                    yield stat(root, os.path.normpath(f"{below}/{name}"))


def stat(root: str, path: str) -> ListedFile:
    """Return the listing entry of the file at a path. Raises FileNotFoundError if nothing is there."""
    full = Path(root, path)
    about = full.lstat()
    if S_ISLNK(about.st_mode):
        if not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(root)):
            return ListedFile(path, 0, fault=LEAVES)
        try:
            about = full.stat()
        except OSError:  # the target does not exist, or the links form a loop
            return ListedFile(path, 0, fault="broken link")
    if not S_ISREG(about.st_mode):
        return ListedFile(path, 0, fault="no regular file")
    return ListedFile(path, about.st_size, str(about.st_mtime_ns))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def atomic_file(path: Path, appear: Callable[[Path, Path], object] = os.replace) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears durably and complete when the block ends, or not at all if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        appear(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
