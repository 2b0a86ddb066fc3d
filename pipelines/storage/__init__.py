"""Read and write files below a URI: a folder of this machine, or a prefix of an S3 store."""

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
from pipelines.storage.errors import named_error
from pipelines.storage.listing import ListedFile, check_size
from pipelines.storage.ranges import Ranges
from pipelines.storage.retries import retry

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def open_storage(uri: str | Path) -> "Storage":
    """Open the storage that a local path, file:// or s3:// URI names; it need not exist yet.

    S3 credentials come from the usual chain (environment, ~/.aws, instance role), the endpoint from AWS_ENDPOINT_URL.
    Raises UserError for an empty URI, another scheme, or credentials in the URI.
    """
    text = str(uri).strip()
    if not text:
        raise UserError("storage URI is empty; try a folder such as data/shards, or s3://bucket/prefix")
    if "://" not in text:
        return Storage(str(Path(text).expanduser().absolute()))
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"{parts.scheme}:// URI contains credentials or options; remove them and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    if parts.scheme == "file":
        return Storage(str(Path(unquote(parts.path)).absolute()))
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"cannot store at {text!r}; try a folder, file:///folder or s3://bucket/prefix")
    key = _checked(parts.path.strip("/"), text)
    return Storage(f"s3://{parts.netloc}/{key}".rstrip("/"))


def storage_of(file: str) -> tuple["Storage", str]:
    """Split a file's path or URI into the storage that holds it and its name there.

    Raises UserError if it has no name.
    """
    text = file.strip() if "://" in file else str(Path(file).expanduser().absolute())
    folder, _, name = text.rpartition("/")
    if not name or folder.endswith(":/"):
        raise UserError(f"{file!r} names no file; try sheet.png or s3://bucket/sheet.png")
    return open_storage(folder or "/"), name


@dataclass(frozen=True)
class Storage:
    """A folder or S3 prefix, given by its absolute URI. Paths are relative to it and cannot leave it.

    A pickle holds only the URI.
    """

    uri: str

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    def join(self, path: str) -> str:
        """Return the URI of a path within this storage."""
        return f"{self.uri.rstrip('/')}/{_checked(path, self.uri)}" if path else self.uri

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Read all bytes of a file.

        Raises FileNotFoundError or PermissionError that name the file, and UserError if it is larger than `max_bytes`,
        before reading it into memory.
        """
        with self._named_errors("read", path):
            if not self.is_local:
                return s3.read(self._key(path), max_bytes)
            with Path(self.join(path)).open("rb") as file:
                check_size(os.fstat(file.fileno()).st_size, max_bytes)
                return file.read()

    def read_range(self, path: str, offset: int, num_bytes: int) -> bytes:
        """Read `num_bytes` bytes of a file from `offset`; fewer only at its end."""
        with self._named_errors("read", path):
            if not self.is_local:
                return s3.read_range(self._key(path), offset, num_bytes)
            with Path(self.join(path)).open("rb") as file:
                file.seek(offset)
                return file.read(num_bytes)

    def write(self, path: str, content: bytes) -> None:
        """Write the file atomically and durably: a reader sees the old content or the new, never a part."""
        with self._named_errors("write", path):
            if self.is_local:
                with local.atomic_file(Path(self.join(path))) as file:
                    file.write(content)
                return
            s3.write(self._key(path), content)

    def write_new(self, path: str, content: bytes) -> bool:
        """Create the file if it does not exist; return whether it now holds exactly these bytes.

        An existing file is never changed. Of several concurrent writers one wins; the others get False, unless they
        wrote the same bytes.
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
                # File systems without hard links, such as some network disks: the last of two writers wins.
                if target.exists():
                    return target.read_bytes() == content
                self.write(path, content)
            return True

    def is_empty(self) -> bool:
        """Return whether the storage holds nothing, not even a hidden file, or does not exist.

        The temporary file of a writer is nothing: it may have been killed.
        """
        with self._named_errors("list", ""):
            if self.is_local:
                found = Path(self.uri).iterdir() if os.path.lexists(self.uri) else ()
                return all(_TEMPORARY.fullmatch(path.name) for path in found)
            return next(s3.walk(self._key("")), None) is None

    def exists(self, path: str = "") -> bool:
        """Return whether the file exists. For a folder, or an empty path, return whether it holds anything."""
        with self._named_errors("read", path):
            if self.is_local:
                return os.path.lexists(self.join(path))
            return self._info(path).type != pafs.FileType.NotFound

    def is_folder(self, path: str) -> bool:
        """Return whether the path is a folder, or a prefix of keys."""
        if self.is_local:
            return Path(self.join(path)).is_dir()
        return self._info(path).type == pafs.FileType.Directory

    def list(self, prefix: str = "", suffix: str = "") -> list[tuple[str, int]]:
        """List path and size of every file below folder `prefix`, sorted by path; empty if there is no such folder.

        Hidden files and folders, links to folders, and links that leave the root are not listed.
        """
        return sorted((path, size) for path, size in self.walk(prefix) if path.endswith(suffix))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield what `list` returns, unsorted and incrementally: memory does not grow with the number of files.

        Keys of an object store need not be valid relative paths: see `stays_inside`.
        """
        yield from ((found.path, found.num_bytes) for found in self.files(prefix) if not found.fault)

    def files(self, prefix: str = "") -> Iterator[ListedFile]:
        """Yield what `walk` yields, with versions, and also entries that must not be read.

        Those are broken links, links out of the root, links to folders, and devices.
        """
        with self._named_errors("list", prefix):
            yield from local.walk(self.uri, self.join(prefix)) if self.is_local else self._walk_s3(prefix)

    def stat(self, path: str) -> ListedFile:
        """Return the listing entry of one file. Raises FileNotFoundError if it does not exist."""
        with self._named_errors("read", path):
            if self.is_local:
                return local.stat(self.uri, _checked(path, self.uri))
            return s3.stat(self._key(path))._replace(path=path)

    def delete(self, path: str) -> None:
        """Delete the file if it exists."""
        with self._named_errors("delete", path):
            if self.is_local:
                Path(self.join(path)).unlink(missing_ok=True)
            else:
                s3.delete(self._key(path))

    def delete_temporaries(self) -> None:
        """Delete temporary files that killed writers left behind. Nobody may be writing. An object store has none."""
        if self.is_local:
            for path in Path(self.uri).rglob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def delete_empty(self, path: str) -> None:
        """Delete folders without files at and below the path. An object store has none."""
        if self.is_local:
            for folder, _, _ in os.walk(self.join(path), topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()

    def delete_tree(self) -> None:
        """Delete everything in the storage, hidden files included."""
        with self._named_errors("delete", ""):
            if self.is_local:
                for entry in Path(self.uri).iterdir() if Path(self.uri).is_dir() else ():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            elif self._info("").type == pafs.FileType.Directory:
                retry(lambda: s3.filesystem().delete_dir_contents(self._key(""), missing_dir_ok=True), self.uri)

    @contextmanager
    def create(self, path: str) -> Iterator[IO[bytes]]:
        """Open a file for sequential writing that appears complete when the block ends, or not at all if it raises."""
        with self._named_errors("write", path):
            if self.is_local:
                with local.atomic_file(Path(self.join(path))) as file:
                    yield file
                return
            with tempfile.TemporaryFile() as file:
                yield file
                s3.write(self._key(path), file)

    def open_input(self, path: str) -> Any:
        """Open a random-access file for pyarrow."""
        with self._named_errors("read", path):
            if self.is_local:
                return pafs.LocalFileSystem().open_input_file(self.join(path))
            return s3.open_input(self._key(path))

    def ranges(self, path: str) -> Ranges:
        """Open a file for reading byte ranges from any number of threads."""
        with self._named_errors("read", path):
            local_file = pafs.LocalFileSystem().open_input_file
            parts = local_file(self.join(path)) if self.is_local else s3.RetryingParts(self._key(path))
            return Ranges(parts, partial(self._named_errors, "read", path))

    def _key(self, path: str) -> str:
        return self.join(path).removeprefix("s3://")

    def _info(self, path: str) -> pafs.FileInfo:
        return retry(lambda: s3.filesystem().get_file_info(self._key(path)), self.join(path))

    def _walk_s3(self, prefix: str) -> Iterator[ListedFile]:
        root, start = self._key("") + "/", len(self._key(prefix)) + 1
        for found in s3.walk(self._key(prefix)):
            if not any(part.startswith(".") and part.strip(".") for part in found.path[start:].split("/")):
                yield found._replace(path=found.path.removeprefix(root))

    @contextmanager
    def _named_errors(self, verb: str, path: str) -> Iterator[None]:
        """Translate the storage's errors into ones that name the URI and the remedy, without credentials."""
        try:
            yield
        except OSError as error:
            # The error of another storage, which the block read, is already translated.
            if getattr(error, "is_named", False):
                raise
            named = named_error(error, verb, self.join(path), self.is_local)
            named.is_named = True  # pyright: ignore[reportAttributeAccessIssue]
            raise named from None


def stays_inside(path: str) -> bool:
    """Return whether a relative path can only denote something below its starting point."""
    return not (path.startswith("/") or "\0" in path or "//" in path or {"..", "."} & set(path.split("/")))


def _checked(path: str, uri: str) -> str:
    if not stays_inside(path):
        raise UserError(f"path {path!r} would leave {uri}; try a relative path without '..'")
    return path
