"""LMDB by py-lmdb. One database is one file of rows with one group.

LMDB knows keys and values and nothing else, and programs differ in what they make of them. Two layouts are read:

1. Keys of columns, `image-000000001` and `label-000000001`: the words are columns, and the numbers are rows.
2. Any other keys: each value that is an image is a row. Folders in keys (`train/cat/1.jpg`) are split and label.

The rest is counted as passed over; pickled values are never unpickled.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.sources.content import HEAD_BYTES, is_image
from pipelines.sources.entry import by_folder
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import Content, content_of, damaged, folder_of, missing
from pipelines.storage import Storage

NAME = re.compile(r"(?:.*/)?data\.mdb|.*\.lmdb")
LOCK = re.compile(r"(?:.*/)?(?:lock\.mdb|.*\.[lm]db-lock)", re.IGNORECASE)
_COLUMN = re.compile(rb"([A-Za-z_]{1,64})-(\d{1,18})")
_IMAGE = "image"
_MAX_LABEL_BYTES = 1024


class ColumnsOfKeys:
    """Layout 1: `image-1`, `label-1`. A row is a number; a column has a value for each, or none."""

    def __init__(self, transaction: Any, uri: str) -> None:
        self._transaction, self._uri, self.passed_over = transaction, uri, PassedOver()
        self._keys: dict[str, dict[int, bytes]] = {}
        for key in transaction.cursor().iternext(values=False):
            found = _COLUMN.fullmatch(key)
            if not found:
                self.passed_over.add("values of no column", f"{uri}/{_shown(bytes(key))}", beside=True)
                continue
            of_column = self._keys.setdefault(found[1].decode(), {})
            if int(found[2]) in of_column:
                raise UserError(f"{uri} has {_shown(bytes(key))} twice but for zeros; which is meant is unknown")
            of_column[int(found[2])] = bytes(key)
        self._numbers = sorted(set().union(*self._keys.values()))
        self.schema = pa.schema([(name, self._type(name)) for name in self._keys])

    def _type(self, name: str) -> pa.DataType:
        first = self._transaction.get(next(iter(self._keys[name].values())))
        return pa.string() if _text(bytes(first[: _MAX_LABEL_BYTES + 1])) is not None else pa.binary()

    def rows(self) -> list[int]:
        return self._numbers

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.table({name: pa.array([self._label(name, n) for n in self._numbers]) for name in columns})

    def _label(self, column: str, number: int) -> str | None:
        value = self.value(column, number)
        text = None if value is None else _text(value)
        if value is not None and text is None:
            raise UserError(f"{self._uri} has {column}-{number}, which is no text in UTF-8; use --labels none")
        return text

    def value(self, column: str, number: int) -> bytes | None:
        key = self._keys[column].get(number)
        return None if key is None else bytes(self._transaction.get(key))

    def values(self, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        yield from (self.value(column, row) for row in rows)


class ImagesByKey:
    """Layout 2: values that are images, under any keys. A row is the place of its key in their order."""

    def __init__(self, transaction: Any, uri: str) -> None:
        self._transaction, self._uri, self.passed_over = transaction, uri, PassedOver()
        self._rows: list[int] | None = None
        self._places: list[tuple[str, str, bool]] = []
        # What all keys agree on decides the columns, and whether folders are labels.
        keys = map(_shown, map(bytes, transaction.cursor().iternext(values=False)))
        folders = [by_folder(key) for key in keys if not _is_about_others(key)]
        fields = [pa.field(_IMAGE, pa.binary())]
        if any(label for _, label, _ in folders):
            # An image in no folder, or in several, makes it unclear which one is the class.
            name = "label" if all(is_sure for _, _, is_sure in folders) else "folder"
            fields.append(pa.field(name, pa.dictionary(pa.int32(), pa.string())))
        if any(split for split, _, _ in folders):
            fields.append(pa.field("split", pa.string()))
        self.schema = pa.schema(fields)

    def rows(self) -> list[int]:
        if self._rows is None:
            self._rows = []
            for number, (key, value) in enumerate(self._transaction.cursor()):
                if is_image(bytes(value[:HEAD_BYTES])):
                    self._rows.append(number)
                    self._places.append(by_folder(_shown(bytes(key))))
                else:
                    self._pass_over(_shown(bytes(key)), bytes(value[:2]))
        return self._rows

    def _pass_over(self, key: str, head: bytes) -> None:
        is_pickled = head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")
        reason = "pickled values, which are never unpickled" if is_pickled else "values that are no images"
        self.passed_over.add(reason, f"{self._uri}/{key}", beside=_is_about_others(key))

    def read(self, columns: Sequence[str]) -> pa.Table:
        found = {"split": [split for split, _, _ in self._places]}
        found["label"] = found["folder"] = [label for _, label, _ in self._places]
        return pa.table({name: pa.array(found[name], pa.string()) for name in columns})

    def values(self, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        keys = enumerate(self._transaction.cursor().iternext(values=False))
        for row in rows:
            yield bytes(self._transaction.get(next(bytes(key) for number, key in keys if number == row)))


class LmdbTable:
    num_groups = 1

    def __init__(self, layout: ColumnsOfKeys | ImagesByKey, uri: str, num_bytes: int) -> None:
        self._layout, self._uri, self._num_bytes = layout, uri, num_bytes
        self.schema, self.passed_over = layout.schema, layout.passed_over

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        found = self._layout.rows()
        if not found:
            raise UserError(
                f"{self._uri} has no value that is an image ({self.passed_over.shown() or 'it is empty'}); write "
                "encoded images as values, or as folders, tar or Parquet files"
            )
        return found, self._num_bytes // len(found)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self._layout.read(columns)

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        yield from map(content_of, self._layout.values(column, rows))


def _text(value: bytes) -> str | None:
    """Return a small value as text; None if it is none."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return text if len(value) <= _MAX_LABEL_BYTES and text.strip().isprintable() else None


def _is_about_others(key: str) -> bool:
    """Return whether a key has the name of a number of samples, or of a list of keys: `__len__`, `num-samples`."""
    return key.startswith("__") or key in ("num-samples", "num_samples", "length", "keys")


def _shown(key: bytes) -> str:
    """Return a key as text; bytes that are none, such as packed numbers, in hexadecimal."""
    text = _text(key)
    return key.hex() if text is None else text


@contextmanager
def open_rows(storage: Storage, path: str, version: str) -> Iterator[LmdbTable]:
    uri = folder_of(storage, path, "LMDB files")
    try:
        import lmdb
    except ImportError:
        raise missing(uri, "an LMDB file", "lmdb") from None
    try:
        # Without a lock nothing is written beside the file; nobody may be writing it.
        environment = lmdb.open(uri, subdir=False, readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise damaged(uri, "LMDB file", error) from None
    try:
        num_bytes = Path(uri).stat().st_size
        needed = environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
        if needed > num_bytes:
            # Reading pages beyond the end of a mapped file would end the process.
            raise damaged(uri, "LMDB file", f"{num_bytes} bytes, but its header says {needed}")
        with environment.begin(buffers=True) as transaction:
            cursor = transaction.cursor()
            is_first = cursor.set_range(f"{_IMAGE}-".encode()) and _COLUMN.fullmatch(cursor.key()) is not None
            has_columns = is_first and bytes(cursor.key()).startswith(f"{_IMAGE}-".encode())
            del cursor
            yield LmdbTable((ColumnsOfKeys if has_columns else ImagesByKey)(transaction, uri), uri, num_bytes)
    except lmdb.Error as error:
        raise damaged(uri, "LMDB file", error) from None
    finally:
        environment.close()
