"""Which kinds of files have rows, how their names look, and which module reads each."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

from pipelines.sources import lance_tables, lmdb_tables, mds_tables, parquet, tfrecord_tables
from pipelines.sources.table_files import TableFile
from pipelines.storage import Storage

PARQUET = "Parquet files"
_OPEN: dict[str, Callable[[Storage, str, str], AbstractContextManager[TableFile]]] = {
    PARQUET: parquet.open_rows,
    "Lance datasets": lance_tables.open_rows,
    "MDS shards": mds_tables.open_rows,
    "TFRecord files": tfrecord_tables.open_rows,
    "LMDB files": lmdb_tables.open_rows,
}
_NAMES = {
    PARQUET: re.compile(r".*\.parquet"),
    "MDS shards": mds_tables.NAME,
    "TFRecord files": tfrecord_tables.NAME,
    "LMDB files": lmdb_tables.NAME,
}


def open_rows(kind: str, storage: Storage, path: str, version: str = "") -> AbstractContextManager[TableFile]:
    """Open a file of a kind of `kind_of_rows`. Raises UserError, here or later, for damage and a missing library.

    `version` is that of the listing; a Lance dataset is read as it was then.
    """
    return _OPEN[kind](storage, path, version)


def kind_of_rows(path: str) -> str:
    """Return the kind of the file by its name; empty if it is none with rows, and for the files of a Lance dataset."""
    lower = path.lower()
    return next((kind for kind, name in _NAMES.items() if name.fullmatch(lower)), "")
