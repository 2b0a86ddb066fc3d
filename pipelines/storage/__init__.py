"""A URI becomes a place to read and write: a folder of this machine, or a prefix of an S3 store."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from mae_core.errors import UserError
from pipelines.storage import local, s3
from pipelines.storage.errors import in_words
from pipelines.storage.listing import Found, check_size
from pipelines.storage.patience import patiently
from pipelines.storage.ranges import Ranges

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def open_storage(uri: str | Path) -> "Storage":
    """The place that a local path, file:// or s3:// URI names; it need not exist yet.

    S3 credentials come from the usual chain (environment, ~/.aws, instance role), the endpoint from AWS_ENDPOINT_URL.
    Raises UserError for an empty URI, another scheme, or credentials within the URI.
    """
    text = str(uri).strip()
    if not text:
        raise UserError("storage URI is empty; try a folder such as data/shards, or s3://bucket/prefix")
    if "://" not in text:
        return Storage(str(Path(text).expanduser().absolute()))
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"{parts.scheme}:// URI carries credentials or options; leave them out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    if parts.scheme == "file":
        return Storage(str(Path(unquote(parts.path)).absolute()))
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"cannot store at {text!r}; try a folder, file:///folder or s3://bucket/prefix")
    key = _checked(parts.path.strip("/"), text)
    return Storage(f"s3://{parts.netloc}/{key}".rstrip("/"))


def storage_of(file: str) -> tuple["Storage", str]:
    """Where a file lies and its name there, by its path or URI. Raises UserError for one without a name."""
    text = file.strip() if "://" in file else str(Path(file).expanduser().absolute())
    folder, _, name = text.rpartition("/")
    if not name or folder.endswith(":/"):
        raise UserError(f"{file!r} names no file; try sheet.png or s3://bucket/sheet.png")
    return open_storage(folder or "/"), name


@dataclass(frozen=True)
class Storage:
    """A place by its absolute URI, all that a pickle of it holds; paths are relative to it and cannot leave it."""

    uri: str

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    def join(self, path: str) -> str:
        """The URI of a path within."""
        return f"{self.uri.rstrip('/')}/{_checked(path, self.uri)}" if path else self.uri

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """All bytes of a file. Raises FileNotFoundError or PermissionError that name it.

        Raises UserError for more than `max_bytes`, before they are in memory.
        """
        with self._named_errors("read", path):
            if not self.is_local:
                return s3.read(self._key(path), max_bytes)
            with Path(self.join(path)).open("rb") as file:
                check_size(os.fstat(file.fileno()).st_size, max_bytes)
                return file.read()

    def read_range(self, path: str, offset: int, num_bytes: int) -> bytes:
        """So many bytes of a file from `offset` on; fewer only where it ends."""
        with self._named_errors("read", path):
            if not self.is_local:
                return s3.read_range(self._key(path), offset, num_bytes)
            with Path(self.join(path)).open("rb") as file:
                file.seek(offset)
                return file.read(num_bytes)

    def write(self, path: str, content: bytes) -> None:
        """The file holds exactly these bytes and is durable; readers saw the old content or the new, never a part."""
        with self._named_errors("write", path):
            if self.is_local:
                with local.atomic_file(Path(self.join(path))) as file:
                    file.write(content)
                return
            s3.write(self._key(path), content)

    def write_new(self, path: str, content: bytes) -> bool:
        """Whether the file holds exactly these bytes; one that was there before is left as it is, whoever wrote it.

        Of several that write at once, one wins, and the others are told (unless they wrote the same).
        """
        with self._named_errors("write", path):
            if not self.is_local:
                return s3.write_new(self._key(path), content)
            target = Path(self.join(path))
            try:
                with local.atomic_file(target, os.link) as file:
                    file.write(content)
            except FileExistsError:
                return target.read_bytes() == content
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                # A file system without links, such as some network disks: the last of two writers wins.
                if target.exists():
                    return target.read_bytes() == content
                self.write(path, content)
            return True

    def is_empty(self) -> bool:
        """Whether nothing is there, not even a hidden file; so too where the place does not exist."""
        with self._named_errors("list", ""):
            if self.is_local:
                return not os.path.lexists(self.uri) or not any(Path(self.uri).iterdir())
            return next(s3.walk(self._key("")), None) is None

    def exists(self, path: str = "") -> bool:
        """Whether a file (or, where the path is empty or a folder's, anything under it) is there."""
        with self._named_errors("read", path):
            if self.is_local:
                return os.path.lexists(self.join(path))
            return self._info(path).type != pafs.FileType.NotFound

    def is_folder(self, path: str) -> bool:
        """Whether the path names a folder, or a prefix of keys."""
        if self.is_local:
            return Path(self.join(path)).is_dir()
        return self._info(path).type == pafs.FileType.Directory

    def list(self, prefix: str = "", suffix: str = "") -> list[tuple[str, int]]:
        """Path and size of every file below the folder `prefix`, sorted by path; empty where there is no such folder.

        Hidden files and folders below it, links to folders and links that leave the root are not listed.
        """
        return sorted((path, size) for path, size in self.walk(prefix) if path.endswith(suffix))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """What `list` has, in no particular order, as it is found: memory does not grow with the number of files.

        A store's keys may be such that they cannot be read as paths: see `stays_inside`.
        """
        yield from ((found.path, found.num_bytes) for found in self.files(prefix) if not found.fault)

    def files(self, prefix: str = "") -> Iterator[Found]:
        """What `walk` has, with versions, and with what must not be read: links that lead nowhere or out, devices."""
        with self._named_errors("list", prefix):
            yield from local.walk(self.uri, self.join(prefix)) if self.is_local else self._walk_s3(prefix)

    def look(self, path: str) -> Found:
        """What a listing would say of one file. Raises FileNotFoundError where there is none."""
        with self._named_errors("read", path):
            if self.is_local:
                return local.look(self.uri, _checked(path, self.uri))
            return s3.look(self._key(path))._replace(path=path)

    def delete(self, path: str) -> None:
        """The file is gone, whether or not it was there."""
        with self._named_errors("delete", path):
            if self.is_local:
                Path(self.join(path)).unlink(missing_ok=True)
            else:
                s3.delete(self._key(path))

    def delete_temporaries(self) -> None:
        """What killed writers left half-written is gone; nobody may be writing. A store keeps no such files."""
        if self.is_local:
            for path in Path(self.uri).rglob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def delete_empty(self, path: str) -> None:
        """Folders below and at the path that hold no file are gone; a store has none."""
        if self.is_local:
            for folder, _, _ in os.walk(self.join(path), topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()

    def delete_tree(self) -> None:
        """Everything in the place is gone, hidden files too."""
        with self._named_errors("delete", ""):
            if self.is_local:
                for entry in Path(self.uri).iterdir() if Path(self.uri).is_dir() else ():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            elif self._info("").type == pafs.FileType.Directory:
                patiently(lambda: s3.filesystem().delete_dir_contents(self._key(""), missing_dir_ok=True), self.uri)

    @contextmanager
    def create(self, path: str) -> Iterator[IO[bytes]]:
        """A file to write in sequence, which appears whole when the block ends, or not at all if it raises."""
        with self._named_errors("write", path):
            if self.is_local:
                with local.atomic_file(Path(self.join(path))) as file:
                    yield file
                return
            with tempfile.TemporaryFile() as file:
                yield file
                s3.write(self._key(path), file)

    def open_input(self, path: str) -> Any:
        """A random-access file for pyarrow."""
        with self._named_errors("read", path):
            if self.is_local:
                return pafs.LocalFileSystem().open_input_file(self.join(path))
            return s3.open_input(self._key(path))

    def ranges(self, path: str) -> Ranges:
        """A file whose parts are read one by one, by any number of threads."""
        with self._named_errors("read", path):
            local_file = pafs.LocalFileSystem().open_input_file
            parts = local_file(self.join(path)) if self.is_local else s3.PatientParts(self._key(path))
            return Ranges(parts, partial(self._named_errors, "read", path))

    def _key(self, path: str) -> str:
        return self.join(path).removeprefix("s3://")

    def _info(self, path: str) -> pafs.FileInfo:
        return patiently(lambda: s3.filesystem().get_file_info(self._key(path)), self.join(path))

    def _walk_s3(self, prefix: str) -> Iterator[Found]:
        root, start = self._key("") + "/", len(self._key(prefix)) + 1
        for found in s3.walk(self._key(prefix)):
            if not any(part.startswith(".") and part.strip(".") for part in found.path[start:].split("/")):
                yield found._replace(path=found.path.removeprefix(root))

    @contextmanager
    def _named_errors(self, verb: str, path: str) -> Iterator[None]:
        """What the store says becomes an error that names the URI and the remedy, and no credential."""
        try:
            yield
        except OSError as error:
            # One of another place, which was read from within the block.
            if getattr(error, "is_named", False):
                raise
            told = in_words(error, verb, self.join(path), self.is_local)
            told.is_named = True  # pyright: ignore[reportAttributeAccessIssue]
            raise told from None


def stays_inside(path: str) -> bool:
    """Whether a relative path can only name something below where it starts."""
    return not (path.startswith("/") or "\0" in path or "//" in path or {"..", "."} & set(path.split("/")))


def _checked(path: str, uri: str) -> str:
    if not stays_inside(path):
        raise UserError(f"path {path!r} would leave {uri}; try a relative path without '..'")
    return path
