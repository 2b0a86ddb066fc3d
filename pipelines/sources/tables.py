"""Parquet files with a column of encoded images: binary, or Hugging Face's struct<bytes, path>.

Only binary, integer and string columns are read, by their Arrow types; nothing is ever unpickled.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.sources.entry import Entry, split_by_name
from pipelines.sources.parquet import open_table
from pipelines.sources.reading import Place
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category")
_INDEX_THREADS = 4
_MAX_EMPTY_ROWS = 2**20


class Tables:
    """Images in Parquet files. A file whose name contains a split (data/train-00000.parquet) belongs to it."""

    def __init__(self, storage: Storage, files: Sequence[ListedFile]) -> None:
        self._storage, self._files = storage, files
        with open_table(storage, files[0].path) as file:
            schema = file.schema_arrow
        self.place = Place(storage, image_column=_image_column(schema, storage.join(files[0].path)))
        self._label_column = label_column(schema)
        self.classes = _names(schema, self._label_column)
        self.has_explicit_labels = bool(self._label_column)

    def entries(self) -> Iterator[Entry]:
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            for start in range(0, len(self._files), _INDEX_THREADS):
                for entries in pool.map(self._index, self._files[start : start + _INDEX_THREADS]):
                    yield from entries

    def _index(self, found: ListedFile) -> list[Entry]:
        path = found.path
        with open_table(self._storage, path) as file:
            top = [column.split(".")[0] for column in (self.place.image_column, self._label_column) if column]
            missing = [column for column in top if column not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{self._storage.join(path)} has no column {missing[0]!r}, unlike {self._files[0].path}; "
                    "prepare files of one kind at a time"
                )
            return [entry for group in range(file.num_row_groups) for entry in self._group(file, found, group)]

    def _group(self, file: pq.ParquetFile, found: ListedFile, group: int) -> Iterator[Entry]:
        path = found.path
        metadata = file.metadata.row_group(group)
        columns = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
        image = columns.get(self.place.image_column)
        # A small file can claim billions of empty rows, each of which would become an entry.
        if image is None or metadata.num_rows > max(_MAX_EMPTY_ROWS, found.num_bytes):
            raise UserError(f"{self._storage.join(path)} is damaged (row group {group}); copy it again")
        num_bytes = image.total_uncompressed_size // max(1, metadata.num_rows)
        labels = [""] * metadata.num_rows
        if self._label_column:
            values = file.read_row_group(group, columns=[self._label_column])[self._label_column].to_pylist()
            labels = ["" if value is None else self._class(value, path) for value in values]
        first = sum(file.metadata.row_group(g).num_rows for g in range(group))
        split = split_by_name(path)
        for row, label in enumerate(labels):
            name = f"{path}/{first + row:09d}"
            yield Entry(name, path, -1, group, row, num_bytes, split, label, bool(label), found.version)

    def _class(self, value: int | str, path: str) -> str:
        if not self.classes or isinstance(value, str):
            return str(value)
        if not 0 <= value < len(self.classes):
            raise UserError(
                f"{self._storage.join(path)} has label {value}, but {len(self.classes)} class names; fix its schema"
            )
        return self.classes[value]


def label_column(schema: pa.Schema) -> str:
    """Return the name of the integer or string column with the classes; empty if there is none."""
    for name in _LABEL_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pat.is_integer(kind) or pat.is_string(kind) or pat.is_large_string(kind):
                return name
    return ""


def _image_column(schema: pa.Schema, uri: str) -> str:
    """Return the path of the column with the image bytes, such as `image` or `image.bytes`."""
    binary = {name: path for name in schema.names if (path := _bytes_of(schema.field(name)))}
    named = [path for name, path in binary.items() if name in _IMAGE_COLUMNS]
    if len(named or binary) != 1:
        raise UserError(
            f"{uri} has no unambiguous column of images (columns: {', '.join(schema.names)}); "
            "name one `image`, of type binary or struct<bytes, path>"
        )
    return named[0] if named else next(iter(binary.values()))


def _bytes_of(field: pa.Field) -> str:
    if pat.is_binary(field.type) or pat.is_large_binary(field.type):
        return field.name
    if pat.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        inner = field.type.field("bytes").type
        return f"{field.name}.bytes" if pat.is_binary(inner) or pat.is_large_binary(inner) else ""
    return ""


def _names(schema: pa.Schema, column: str) -> list[str]:
    """Return the class names that Hugging Face's datasets stores in the schema, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
