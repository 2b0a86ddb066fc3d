"""Sources of images: a folder of image files, tar files, files of rows, a list of URIs, or ImageNet-1K.

A source lists its images as entries. An entry locates its bytes, so that any task can read them.
"""

import os
from collections.abc import Iterator
from typing import Protocol

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources import folders, imagenet, lance_tables, lists, tables, tars
from pipelines.sources.candidates import Candidates
from pipelines.sources.entry import SPLITS, Entry
from pipelines.sources.listing import COMPRESSED, UNPACK, Listing
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.reading import Place
from pipelines.sources.rows import PARQUET, kind_of_rows
from pipelines.storage import ListedFile, Storage, open_storage
from pipelines.storage.listing import LEAVES

__all__ = ["SPLITS", "Entry", "Place", "Source", "open_source"]


class Source(Protocol):
    """Input of `mae prepare`."""

    @property
    def kind(self) -> str:
        """What it is, in words."""
        ...

    @property
    def passed_over(self) -> PassedOver:
        """What it holds beside its images. Known once entries have been read."""
        ...

    @property
    def candidates(self) -> Candidates:
        """Labels that it may hold and that are not used. Known once entries have been read."""
        ...

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

    @property
    def allows_missing(self) -> bool:
        """Whether a missing label means that the image has none, rather than that the source is incomplete."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Yield every image, in no particular order; memory does not grow with their number."""
        ...


def open_source(uri: str, config: SourceConfig | None = None, group_column: str = "") -> Source:
    """Open the source that a URI names; `group_column` of a table or list is read as the bundle of its entries.

    Raises FileNotFoundError if there is nothing, and UserError if it is of no supported kind, or lacks what the
    config names.
    """
    config = config or SourceConfig()
    name = uri.rstrip("/").rsplit("/", 1)[-1].lower()
    if name.endswith(COMPRESSED):
        raise UserError(f"{uri} is a compressed archive, {UNPACK}")
    if name.endswith((".csv", ".tar")) or kind_of_rows(name):
        folder, file = _split(open_storage(uri))
        if folder.exists(file) and not folder.is_folder(file):
            return _of_file(folder, file, config, group_column)
    storage = open_storage(uri)
    if not storage.exists():
        raise FileNotFoundError(f"{storage.uri} does not exist; give a folder of images, tar or Parquet files")
    if storage.is_local and not storage.is_folder(""):
        raise UserError(f"{storage.uri} is a file, and no .csv list, tar or table of images; give its folder")
    if storage.is_folder(lance_tables.VERSIONS):
        folder, file = _split(storage)
        found = [ListedFile(file, 0, lance_tables.version_of(folder, file))]
        return _of_tables(folder, found, config, PassedOver(), group_column, "Lance datasets")
    if storage.exists(imagenet.SYNSETS):
        source = imagenet.ImageNet(storage, config)
    else:
        source = _of_folder(storage, config, group_column)
    if group_column and not isinstance(source, lists.CsvList | lists.ParquetList | tables.Tables):
        raise UserError(
            f"group_by column:{group_column} is for tables and lists, and {uri} is a {source.kind}; give a regular "
            "expression of its images' names"
        )
    return source


def _split(storage: Storage) -> tuple[Storage, str]:
    folder, _, file = storage.uri.rpartition("/")
    return open_storage(folder or "/"), file


def _of_file(folder: Storage, file: str, config: SourceConfig, group_column: str) -> Source:
    if file.lower().endswith(".csv"):
        return lists.CsvList(folder, file, config, group_column)
    found = _only_file(folder, file)
    if file.lower().endswith(".tar"):
        return tars.Tars(folder, [found], config)
    return _of_tables(folder, [found], config, PassedOver(), group_column, kind_of_rows(file))


def _of_tables(
    storage: Storage,
    files: list[ListedFile],
    config: SourceConfig,
    passed: PassedOver,
    group_column: str,
    kind: str,
) -> Source:
    """Open files of rows that hold images, or Parquet files of their URIs."""
    if kind == PARQUET and lists.is_list(storage, files[0].path, config):
        return lists.ParquetList(storage, [found.path for found in files], config, passed, group_column)
    return tables.Tables(storage, files, config, passed, group_column, kind)


def _only_file(folder: Storage, file: str) -> ListedFile:
    """Return the file that the user named, which may be a link to anywhere."""
    found = folder.stat(file)
    if found.fault == LEAVES:
        folder, name = _split(open_storage(os.path.realpath(folder.join(file))))
        found = folder.stat(name)._replace(path=file)
    if found.fault:
        raise UserError(f"{folder.join(file)} cannot be read ({found.fault}); give the file itself")
    return found


def _of_folder(storage: Storage, config: SourceConfig, group_column: str) -> Source:
    """Open a folder as the kind of the files in it. Raises UserError for a mixture of kinds."""
    listing = Listing(storage, config)
    kind, found = listing.split()
    if kind == "images":
        return folders.Folder(storage, found, config, listing.passed_over, listing.candidates)
    files = sorted(found)
    if kind == "tar files":
        source = tars.Tars(storage, files, config, listing.passed_over)
        source.candidates.merge(listing.candidates)
        return source
    if storage.exists("manifest.json"):
        raise UserError(f"{storage.uri} is already a prepared dataset; give the source that it was made from")
    return _of_tables(storage, files, config, listing.passed_over, group_column, kind)
