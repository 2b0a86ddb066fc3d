"""Tar files of images in the manner of WebDataset: `x.jpg` beside `x.cls`, or in one folder a class.

Headers are read once, here; after that an image is a range of its file.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.decode import SUFFIXES
from pipelines.sources.entry import Entry, by_folder, split_by_name
from pipelines.sources.reading import Place
from pipelines.storage import Storage
from pipelines.storage.listing import Found

_INDEX_THREADS = 4
# Headers are this far apart in tars of small images, so that one request finds many of them.
_READ_AHEAD_BYTES = 2**20
_MAX_LABEL_BYTES = 1024


class Tars:
    """Images of some tar files; a file whose name says so (train-000.tar, val/000.tar) is of that split."""

    def __init__(self, storage: Storage, files: Sequence[Found]) -> None:
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

    def _index(self, found: Found) -> tuple[list[Entry], bool]:
        """The images of one file, and whether labels stand beside them."""
        path = found.path
        images: list[tarfile.TarInfo] = []
        labels: dict[str, str] = {}
        with self._storage.open_input(path) as file, io.BufferedReader(file, _READ_AHEAD_BYTES) as buffered:
            for member, tar in _members(buffered, self._storage.join(path)):
                if member.name.lower().endswith(SUFFIXES):
                    images.append(member)
                elif member.name.lower().endswith(".cls"):
                    labels[_key(member.name)] = self._label(tar, member, path)
        return [self._entry(found, member, labels) for member in images], bool(labels)

    def _label(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> str:
        content = tar.extractfile(member) if 0 < member.size <= _MAX_LABEL_BYTES else None
        try:
            label = content.read().decode().strip() if content else ""
        except UnicodeDecodeError:
            label = ""
        if not label:
            raise ValueError(
                f"{self._storage.join(path)}: {member.name} holds no class; it must be a number or a name in UTF-8"
            )
        return label

    def _entry(self, found: Found, member: tarfile.TarInfo, labels: dict[str, str]) -> Entry:
        name = member.name.removeprefix("./")
        split, label, is_flat = by_folder(name)
        if labels:
            label = labels.get(_key(member.name), "")
            is_flat = bool(label)
        return Entry(
            name=f"{found.path}/{name}",
            path=found.path,
            offset=member.offset_data,
            num_bytes=member.size,
            split=split_by_name(found.path) or split,
            label=label,
            is_flat=is_flat,
            version=found.version,
        )


def _members(file: io.BufferedReader, uri: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Whole visible files of an archive. Raises ValueError that names one that is cut short or damaged."""
    damaged = f"{uri} is cut short or damaged; copy it again"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps what it has seen.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                hidden = any(part.startswith(".") and part.strip(".") for part in member.name.split("/"))
                if member.isreg() and not member.issparse() and not hidden:
                    yield member, tar
            end = tar.offset
    except tarfile.TarError:
        raise ValueError(damaged) from None
    # A damaged header in the middle ends tarfile's reading without a word; a whole archive ends in zeros.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block or block.strip(b"\0"):
        raise ValueError(damaged)


def _key(name: str) -> str:
    """WebDataset's key of a sample: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]
