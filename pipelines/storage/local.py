"""A folder of this machine under `storage.py`."""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipelines.storage.listing import FOLDER_LINK, LEAVES, Found


def walk(root: str, start: str) -> Iterator[Found]:
    """Everything below `start` that is no folder, named relative to `root`, but for what is hidden.

    Links to folders are not followed, so that no loop of them has an end to find.
    """
    for folder, folders, names in os.walk(start, onerror=_raise_unless_missing):
        below = os.path.relpath(folder, root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(folder, name).is_symlink():
                yield Found(os.path.normpath(f"{below}/{name}"), 0, fault=FOLDER_LINK)
        for name in names:
            if not name.startswith("."):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    yield look(root, os.path.normpath(f"{below}/{name}"))


def look(root: str, path: str) -> Found:
    """The file at a path, or what is wrong with it. Raises FileNotFoundError where there is nothing."""
    whole = Path(root, path)
    about = whole.lstat()
    if stat.S_ISLNK(about.st_mode):
        if not Path(os.path.realpath(whole)).is_relative_to(os.path.realpath(root)):
            return Found(path, 0, fault=LEAVES)
        try:
            about = whole.stat()
        except OSError:  # of a link that leads nowhere, or round and round
            return Found(path, 0, fault="broken link")
    if not stat.S_ISREG(about.st_mode):
        return Found(path, 0, fault="no regular file")
    return Found(path, about.st_size, str(about.st_mtime_ns))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def atomic_file(path: Path, appear: Callable[[Path, Path], object] = os.replace) -> Iterator[IO[bytes]]:
    """A file to write, which is durable and appears whole when the block ends, or not at all if it raises."""
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
