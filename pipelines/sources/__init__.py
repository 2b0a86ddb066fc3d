"""Sources of images: a folder of image files, tar files, Parquet, a list of URIs, or Kaggle's ImageNet-1K.

A source lists its images as entries. An entry locates its bytes, so that any task can read them.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol

from mae_core.errors import UserError
from pipelines.images.decode import SUFFIXES
from pipelines.sources import folders, imagenet, lists, tables, tars
from pipelines.sources.entry import SPLITS, Entry
from pipelines.sources.reading import Place
from pipelines.storage import ListedFile, Storage, open_storage
from pipelines.storage.listing import FOLDER_LINK, LEAVES

__all__ = ["SPLITS", "Entry", "Place", "Source", "open_source"]

log = logging.getLogger(__name__)

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
# To reach one image, every task would have to unpack everything before it.
_UNPACK = "which cannot be read in place; unpack it, or convert it to .tar (gunzip does so with a .tar.gz)"
_KINDS = {"images": SUFFIXES, "tar files": (".tar",), "Parquet files": (".parquet",)}


class Source(Protocol):
    """Input of `mae prepare`."""

    @property
    def place(self) -> Place:
        """Place that the paths of its entries are relative to."""
        ...

    @property
    def has_explicit_labels(self) -> bool:
        """Whether labels are stored, rather than names of folders. Known once entries have been read."""
        ...

    @property
    def classes(self) -> list[str]:
        """Class names in the order that the source defines; empty if it defines none."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Yield every image, in no particular order; memory does not grow with their number."""
        ...


def open_source(uri: str) -> Source:
    """Open the source that a URI names.

    Raises FileNotFoundError if there is nothing, and UserError if it is of no supported kind.
    """
    name = uri.rstrip("/").rsplit("/", 1)[-1].lower()
    if name.endswith(_COMPRESSED):
        raise UserError(f"{uri} is a compressed archive, {_UNPACK}")
    if name.endswith((".csv", ".parquet", ".tar")):
        folder, file = _split(open_storage(uri))
        if folder.exists(file) and not folder.is_folder(file):
            return _of_file(folder, file)
    storage = open_storage(uri)
    if not storage.exists():
        raise FileNotFoundError(f"{storage.uri} does not exist; give a folder of images, tar or Parquet files")
    if storage.exists(imagenet.SYNSETS):
        return imagenet.ImageNet(storage)
    return _of_folder(storage)


def _split(storage: Storage) -> tuple[Storage, str]:
    folder, _, file = storage.uri.rpartition("/")
    return open_storage(folder or "/"), file


def _of_file(folder: Storage, file: str) -> Source:
    if file.lower().endswith(".csv"):
        return lists.CsvList(folder, file)
    found = _only_file(folder, file)
    if file.lower().endswith(".tar"):
        return tars.Tars(folder, [found])
    return _of_tables(folder, [found])


def _of_tables(storage: Storage, files: list[ListedFile]) -> Source:
    """Open Parquet files that hold images, or their URIs."""
    if lists.is_list(storage, files[0].path):
        return lists.ParquetList(storage, [found.path for found in files])
    return tables.Tables(storage, files)


def _only_file(folder: Storage, file: str) -> ListedFile:
    """Return the file that the user named, which may be a link to anywhere."""
    found = folder.stat(file)
    if found.fault == LEAVES:
        folder, name = _split(open_storage(os.path.realpath(folder.join(file))))
        found = folder.stat(name)._replace(path=file)
    if found.fault:
        raise UserError(f"{folder.join(file)} cannot be read ({found.fault}); give the file itself")
    return found


def _of_folder(storage: Storage) -> Source:
    """Open a folder as the kind of its first file of a known kind. Raises UserError for a mixture of kinds."""
    files = _known(storage)
    first = next(files, None)
    if first is None:
        archive = next((found.path for found in storage.files() if found.path.lower().endswith(_COMPRESSED)), "")
        if archive:
            raise UserError(f"{storage.join(archive)} is a compressed archive, {_UNPACK}")
        raise UserError(
            f"no image in {storage.uri}; give a folder that has files ending in {' '.join(SUFFIXES)}, .tar or .parquet"
        )
    kind = _kind(first.path)
    found = _only(kind, first.path, chain([first], files), storage)
    if kind == "images":
        return folders.Folder(storage, found)
    if kind == "tar files":
        return tars.Tars(storage, sorted(found))
    if storage.exists("manifest.json"):
        raise UserError(f"{storage.uri} is already a prepared dataset; give the source that it was made from")
    return _of_tables(storage, sorted(found))


def _known(storage: Storage) -> Iterator[ListedFile]:
    """Yield files of known kinds. Log how many compressed archives and links to folders are skipped."""
    num_links, link, num_archives, archive = 0, "", 0, ""
    for found in storage.files():
        if found.path.lower().endswith(_COMPRESSED):
            num_archives, archive = num_archives + 1, found.path
        if found.fault == FOLDER_LINK:
            num_links, link = num_links + 1, found.path
        elif _kind(found.path):
            yield found
    if num_archives:
        log.warning("%s: skipping compressed archives (%d, such as %r)", storage.uri, num_archives, archive)
    if num_links:
        log.warning("%s: not following links to folders (%d, such as %r)", storage.uri, num_links, link)


def _kind(path: str) -> str:
    return next((kind for kind, suffixes in _KINDS.items() if path.lower().endswith(suffixes)), "")


def _only(kind: str, first: str, files: Iterable[ListedFile], storage: Storage) -> Iterator[ListedFile]:
    for found in files:
        other = _kind(found.path)
        if other != kind:
            raise UserError(
                f"{storage.uri} has {kind} such as {first} and {other} such as {found.path}; prepare one kind at a time"
            )
        if found.fault and kind != "images":
            raise UserError(f"{storage.join(found.path)} cannot be read ({found.fault}); replace it by the file itself")
        yield found
