"""Where images come from: a prefix of image files, tar files, Parquet, a list of URIs, or Kaggle's ImageNet-1K.

A source says what it has, entry by entry, and an entry where its bytes lie, so that any task can read any of them.
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
# An image within could be reached only by unpacking all that lies before it, anew in every task.
_UNPACK = "which cannot be read in place; unpack it, or make it a .tar (gunzip does so with a .tar.gz)"
_KINDS = {"images": SUFFIXES, "tar files": (".tar",), "Parquet files": (".parquet",)}


class Source(Protocol):
    """What `mae prepare` reads from."""

    @property
    def place(self) -> Place:
        """What its entries' paths are relative to."""
        ...

    @property
    def has_explicit_labels(self) -> bool:
        """Whether labels were written down, rather than being names of folders. Known when entries have been read."""
        ...

    @property
    def classes(self) -> list[str]:
        """Names of classes in an order that the source gives; empty where it gives none."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every image, in no particular order; memory does not grow with their number."""
        ...


def open_source(uri: str) -> Source:
    """The source that a URI names. Raises FileNotFoundError or UserError where there is none of a kind we read."""
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
    """Parquet with images in it, or with their URIs."""
    if lists.is_list(storage, files[0].path):
        return lists.ParquetList(storage, [found.path for found in files])
    return tables.Tables(storage, files)


def _only_file(folder: Storage, file: str) -> ListedFile:
    """The one file that the user named, which may be a link to anywhere."""
    found = folder.stat(file)
    if found.fault == LEAVES:
        folder, name = _split(open_storage(os.path.realpath(folder.join(file))))
        found = folder.stat(name)._replace(path=file)
    if found.fault:
        raise UserError(f"{folder.join(file)} cannot be read ({found.fault}); give the file itself")
    return found


def _of_folder(storage: Storage) -> Source:
    """What the first file that we know decides; files of another kind beside it are refused."""
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
        raise UserError(f"{storage.uri} is a prepared dataset already; give the source that it was made from")
    return _of_tables(storage, sorted(found))


def _known(storage: Storage) -> Iterator[ListedFile]:
    """Files of the kinds that we know. What compressed archives and links to folders lead to is said to be left out."""
    num_links, link, num_archives, archive = 0, "", 0, ""
    for found in storage.files():
        if found.path.lower().endswith(_COMPRESSED):
            num_archives, archive = num_archives + 1, found.path
        if found.fault == FOLDER_LINK:
            num_links, link = num_links + 1, found.path
        elif _kind(found.path):
            yield found
    if num_archives:
        log.warning("%s: compressed archives are left out (%d, such as %r)", storage.uri, num_archives, archive)
    if num_links:
        log.warning("%s: links to folders are not followed (%d, such as %r)", storage.uri, num_links, link)


def _kind(path: str) -> str:
    return next((kind for kind, suffixes in _KINDS.items() if path.lower().endswith(suffixes)), "")


def _only(kind: str, first: str, files: Iterable[ListedFile], storage: Storage) -> Iterator[ListedFile]:
    for found in files:
        other = _kind(found.path)
        if other != kind:
            raise UserError(
                f"{storage.uri} has {kind} such as {first} and {other} such as {found.path}; "
                "prepare them one after the other"
            )
        if found.fault and kind != "images":
            raise UserError(f"{storage.join(found.path)} cannot be read ({found.fault}); copy the file itself there")
        yield found
