"""Tar files of images in WebDataset's layout: `x.jpg` with `x.cls`, or one folder per class.

Headers are read once, when listing. After that an image is a byte range of its file.
"""

import io
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mae_core.errors import UserError
from pipelines.images.decode import SUFFIXES
from pipelines.sources.entry import Entry, by_folder, split_by_name
from pipelines.sources.reading import Place
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile

_INDEX_THREADS = 4
# In tars of small images, one request of this size covers many headers.
_READ_AHEAD_BYTES = 2**20
_MAX_LABEL_BYTES = 1024
_MAX_EXTENSION_BYTES = 2**20
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


class Tars:
    """Images in tar files. A file whose name contains a split (train-000.tar, val/000.tar) belongs to it."""

    def __init__(self, storage: Storage, files: Sequence[ListedFile]) -> None:
        self.place = Place(storage)
        self.classes: list[str] = []
        self.has_explicit_labels = False
        self._storage, self._files = storage, files

    def entries(self) -> Iterator[Entry]:
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            for start in range(0, len(self._files), _INDEX_THREADS):
                for entries, has_labels in pool.map(self._index, self._files[start : start + _INDEX_THREADS]):
                    self.has_explicit_labels |= has_labels
                    yield from entries

    def _index(self, found: ListedFile) -> tuple[list[Entry], bool]:
        """Return the images of one tar file, and whether it has labels."""
        images: list[_Image] = []
        labels: dict[str, str] = {}
        with self._storage.open_input(found.path) as file, io.BufferedReader(file, _READ_AHEAD_BYTES) as buffered:
            for member, tar in _members(buffered, self._storage.join(found.path)):
                if member.name.lower().endswith(SUFFIXES):
                    images.append(_image(member))
                elif member.name.lower().endswith(".cls"):
                    labels[_key(member.name)] = self._label(tar, member, found.path)
        linked = {image.name: image for image in images if not image.link} if any(i.link for i in images) else {}
        followed = (image if not image.link else image.at(linked.get(image.link)) for image in images)
        return [self._entry(found, image, labels) for image in followed], bool(labels)

    def _label(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> str:
        content = tar.extractfile(member) if member.isreg() and 0 < member.size <= _MAX_LABEL_BYTES else None
        try:
            label = content.read().decode().strip() if content else ""
        except UnicodeDecodeError:
            label = ""
        if not label:
            raise UserError(
                f"{self._storage.join(path)}: {member.name} contains no class; it must be a number or a name in UTF-8"
            )
        return label

    def _entry(self, found: ListedFile, image: "_Image", labels: dict[str, str]) -> Entry:
        name = image.name.removeprefix("./")
        split, label, is_flat = by_folder(name)
        if labels:
            label = labels.get(_key(image.name), "")
            is_flat = bool(label)
        return Entry(
            name=f"{found.path}/{name}",
            path=found.path,
            offset=image.offset,
            num_bytes=image.num_bytes,
            split=split_by_name(found.path) or split,
            label=label,
            is_flat=is_flat,
            version=found.version,
            fault=image.fault,
        )


class _Image(NamedTuple):
    """The part of a member that is kept: tarfile's own objects are many times larger."""

    name: str
    offset: int
    num_bytes: int
    link: str = ""
    """Name of the member that it links to; empty for a file."""
    fault: str = ""

    def at(self, other: "_Image | None") -> "_Image":
        """Return this image with the byte range of the linked one, or with a fault if that does not exist."""
        if other is None:
            return self._replace(fault="broken link")
        return self._replace(offset=other.offset, num_bytes=other.num_bytes, fault=other.fault)


def _image(member: tarfile.TarInfo) -> _Image:
    link = member.linkname if member.islnk() else ""
    if member.issym():
        link = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    is_file = member.isreg() and not member.issparse()
    fault = "" if is_file or link else "no regular file"
    return _Image(member.name, member.offset_data, member.size if is_file else 0, link, fault)


class _Header(tarfile.TarInfo):
    """A header with a limit on its extensions, which tarfile reads into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError("an extended header is too large")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue] -- tarfile's own hook


def _members(file: io.BufferedReader, uri: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield all visible members of an archive except folders. Raises UserError if it is truncated or damaged."""
    damaged = f"{uri} is truncated or damaged; copy it again"
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps every member in memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                hidden = any(part.startswith(".") and part.strip(".") for part in member.name.split("/"))
                if not member.isdir() and not hidden:
                    yield member, tar
            end = tar.offset
    except tarfile.TarError:
        raise UserError(damaged) from None
    # tarfile stops silently at a damaged header. A complete archive ends in zeros.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block or block.strip(b"\0"):
        raise UserError(damaged)


def _key(name: str) -> str:
    """Return WebDataset's key of a sample: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]
