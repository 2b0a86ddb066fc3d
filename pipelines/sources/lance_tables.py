"""Lance datasets by pylance. One dataset is one file of rows, which is a folder; its groups are fragments.

The version that was listed is the one that is read. Deleted rows are left out by Lance itself.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import Content, content_of, damaged, missing
from pipelines.storage import Storage

FOLDER = re.compile(r"(.+?\.lance)/(?:_versions|_transactions|_deletions|_indices|data)/.*", re.IGNORECASE)
"""A file within a dataset; the first group is the dataset's path."""
VERSIONS = "_versions"
_BATCH_ROWS = 16
# Credentials and endpoint are those of the environment, for Lance as for others.
_STORE_OPTIONS = {"allow_http": "true"}


class LanceTable:
    def __init__(self, dataset: Any) -> None:
        self._dataset, self.passed_over = dataset, PassedOver()
        self.version = str(dataset.version)
        self._fragments = dataset.get_fragments()
        self.num_groups = len(self._fragments)
        self._blobs = {field.name for field in dataset.schema if _is_blob(field)}
        self.schema = pa.schema([_plain(field) for field in dataset.schema], dataset.schema.metadata)

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        num = self._fragments[group].count_rows()
        sizes = [found.file_size_bytes or 0 for found in self._fragments[group].data_files()]
        return range(num), sum(sizes) // max(1, num)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self._fragments[group].to_table(columns=list(columns))

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        top, _, inner = column.partition(".")
        if top in self._blobs:
            yield from self._blob_contents(group, rows, top)
            return
        for start in range(0, len(rows), _BATCH_ROWS):
            found = self._fragments[group].take(list(rows[start : start + _BATCH_ROWS]), columns=[top])
            for value in found[top].to_pylist():
                yield content_of(value[inner] if inner and value is not None else value)

    def _blob_contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        before = sum(fragment.count_rows() for fragment in self._fragments[:group])
        for row in rows:
            (blob,) = self._dataset.take_blobs(column, indices=[before + row])
            yield content_of(blob.readall())


def _is_blob(field: pa.Field) -> bool:
    named = str(getattr(field.type, "extension_name", ""))
    return named.startswith("lance.blob") or (field.metadata or {}).get(b"lance-encoding:blob") == b"true"


def _plain(field: pa.Field) -> pa.Field:
    """Return the field as its values are read: blobs as binary, extensions as what they store."""
    if _is_blob(field):
        return pa.field(field.name, pa.large_binary())
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    return pa.field(field.name, kind)


def version_of(storage: Storage, path: str) -> str:
    """Return the newest version of a dataset."""
    with open_rows(storage, path, "") as table:
        return table.version


@contextmanager
def open_rows(storage: Storage, path: str, version: str) -> Iterator[LanceTable]:
    folder = storage.join(path)
    try:
        import lance
    except ImportError:
        raise missing(folder, "a Lance dataset", "pylance") from None
    try:
        options = None if storage.is_local else _STORE_OPTIONS
        table = LanceTable(lance.dataset(folder, version=int(version) if version else None, storage_options=options))
        yield table
    except (OSError, RuntimeError, KeyError, pa.ArrowException) as error:
        raise damaged(folder, "Lance dataset", error) from None
    except ValueError as error:
        if type(error) is ValueError:
            raise damaged(folder, "Lance dataset", error) from None
        raise
