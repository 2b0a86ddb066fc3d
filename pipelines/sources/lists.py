"""A CSV or Parquet list of URIs: a column `uri` (or path, file, image), and optionally `label` and `split`."""

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.sources.entry import SPLITS, Entry
from pipelines.sources.parquet import open_table
from pipelines.sources.reading import Place
from pipelines.sources.tables import label_column
from pipelines.storage import Storage

_URI_COLUMNS = ("uri", "url", "path", "file", "filename", "file_name", "image")
_LABEL_COLUMNS = ("label", "class", "target", "category")
_BATCH_ROWS = 8192


class CsvList:
    """Images that a CSV file with a header lists; relative paths are relative to its folder."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.place = Place(storage, takes_uris=True)
        self.classes: list[str] = []
        self._storage, self._path, self._uri = storage, path, storage.join(path)
        header = next(self._rows(), (0, []))[1]
        self._columns = _columns(header, self._uri)
        self._width = len(header)
        self.has_explicit_labels = "label" in self._columns

    def entries(self) -> Iterator[Entry]:
        rows = self._rows()
        next(rows)
        for number, row in rows:
            where = f"line {number} of {self._uri}"
            if row and len(row) != self._width:
                raise UserError(f"{where} has {len(row)} fields where the header has {self._width}; fix it")
            if row:
                yield _entry(self._storage, where, {key: row[i].strip() for key, i in self._columns.items()})

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the fields of each row, with the number of its last line."""
        with self._text() as text:
            try:
                rows = csv.reader(text)
                for row in rows:
                    yield rows.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{self._uri} is not a CSV file in UTF-8 ({error}); save it as UTF-8") from None

    def _text(self) -> io.TextIOWrapper:
        file = io.BufferedReader(self._storage.open_input(self._path), 2**20)
        return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


class ParquetList:
    """Images that Parquet files list in a column of strings."""

    def __init__(self, storage: Storage, paths: Sequence[str]) -> None:
        self.place = Place(storage, takes_uris=True)
        self.classes: list[str] = []
        self._storage, self._paths = storage, paths
        with open_table(storage, paths[0]) as file:
            self._label = label_column(file.schema_arrow)
            self._columns = {"uri": _uri_column(file)} | ({"label": self._label} if self._label else {})
            if "split" in file.schema_arrow.names:
                self._columns["split"] = "split"
        self.has_explicit_labels = bool(self._label)

    def entries(self) -> Iterator[Entry]:
        for path in self._paths:
            with open_table(self._storage, path) as file:
                missing = sorted(set(self._columns.values()) - set(file.schema_arrow.names))
                if missing:
                    raise UserError(
                        f"{self._storage.join(path)} has no column {missing[0]!r}, unlike {self._paths[0]}; "
                        "prepare files of one kind at a time"
                    )
                columns = list(self._columns.values())
                rows = (row for batch in file.iter_batches(_BATCH_ROWS, columns=columns) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    found = {k: "" if row[c] is None else str(row[c]).strip() for k, c in self._columns.items()}
                    yield _entry(self._storage, f"row {number} of {self._storage.join(path)}", found)


def is_list(storage: Storage, path: str) -> bool:
    """Return whether a Parquet file lists images by name instead of containing them."""
    with open_table(storage, path) as file:
        return bool(_uri_column(file)) and not any(
            pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_struct(kind) for kind in file.schema_arrow.types
        )


def _uri_column(file: object) -> str:
    schema = file.schema_arrow  # pyright: ignore[reportAttributeAccessIssue]
    for name in _URI_COLUMNS:
        if name in schema.names and (
            pat.is_string(schema.field(name).type) or pat.is_large_string(schema.field(name).type)
        ):
            return name
    return ""


def _columns(header: Sequence[str], uri: str) -> dict[str, int]:
    """Return the position of each known field in the header."""
    names = [name.strip().lower() for name in header]
    columns = {}
    for key, known in (("uri", _URI_COLUMNS), ("label", _LABEL_COLUMNS), ("split", ("split",))):
        position = next((names.index(name) for name in known if name in names), None)
        if position is not None:
            columns[key] = position
    if "uri" not in columns:
        raise UserError(f"the first line of {uri} names no column of images; make it uri,label or path,label")
    return columns


def _entry(storage: Storage, where: str, row: dict[str, str]) -> Entry:
    uri, label, split = row["uri"], row.get("label", ""), row.get("split", "").lower()
    split = "val" if split in ("valid", "validation") else split
    if not uri:
        raise UserError(f"{where} names no image; give its path or s3:// URI")
    if split and split not in SPLITS:
        raise UserError(f"{where} has split {split!r}; it must be train, val or test")
    is_local = uri.startswith(("/", "file://"))
    if "://" in uri and not uri.startswith(("s3://", "file://")):
        raise UserError(f"{where} names {uri}, which cannot be read; give paths, s3:// or file:// URIs")
    if is_local and not storage.is_local:
        raise UserError(f"{where} names {uri} on this machine, which a list in a bucket may not; use s3:// or a path")
    return Entry(name=uri, path=uri, split=split, label=label, is_flat=bool(label))
