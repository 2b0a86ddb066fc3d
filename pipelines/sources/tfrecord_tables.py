"""TFRecord files of `tf.train.Example`, parsed by the package tfrecord. A feature is a column; the file is one group.

The package's own reader compares no checksums and takes any length as given, so records are read here: a length and
its checksum, the record and its checksum. The position of a row is its record's first byte.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.sources.labels import is_likely
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import MAX_IMAGE_BYTES, Content, content_of, damaged, missing
from pipelines.storage import Storage

NAME = re.compile(r".*\.tfrec(?:ord)?s?(?:[-_.]\d+(?:-of-\d+)?)?|(?:.*/)?(?:train|validation|val|test)-\d{5}-of-\d{5}")
_KINDS = {"bytes_list": pa.binary(), "int64_list": pa.int64(), "float_list": pa.float64()}
# An Example has little beside its image.
_MAX_RECORD_BYTES = MAX_IMAGE_BYTES + 2**20
_MASK = 0xA282EAD8
_NUM_EXAMINED = 64


class TfRecordTable:
    num_groups = 1

    def __init__(self, file: Any, uri: str, num_bytes: int) -> None:
        self._file, self._uri, self._num_bytes = file, uri, num_bytes
        self.passed_over = PassedOver()
        self._rows: list[int] | None = None
        self._columns: dict[str, list[Any]] = {}
        kinds: dict[str, pa.DataType] = {}
        for (_, record), _ in zip(self._records(), range(_NUM_EXAMINED)):
            for name, found in self._features(record).items():
                kinds[name] = _wider(kinds.get(name), _type_of(*found))
        if not kinds:
            raise damaged(uri, "TFRecord file", "it has no record with a feature")
        self.schema = pa.schema(sorted(kinds.items()))

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        if self._rows is None:
            self._index(column)
        assert self._rows is not None
        return self._rows, self._num_bytes // max(1, len(self._rows))

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return pa.table({name: _column(self._columns[name], name, self._uri) for name in columns})

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        for row in rows:
            found = self._features(self._record(row)).get(column)
            if found and len(found[1]) > 1:
                yield ValueError(f"other images: {len(found[1])} in feature {column} of one record, where one is read")
            else:
                yield content_of(found[1][0] if found and found[1] else None)

    def _index(self, image: str) -> None:
        """Read all records once: their positions, and the values of columns other than the image's."""
        self._rows = []
        self._columns = {name: [] for name in self.schema.names if name != image}
        for position, record in self._records():
            self._rows.append(position)
            features = self._features(record)
            late = next((name for name in features if name not in self.schema.names and is_likely(name)), "")
            if late:
                raise UserError(
                    f"{self._uri} has feature {late} at byte {position}, and none before; write records "
                    "with the same features, a missing one with an empty list"
                )
            for name, values in self._columns.items():
                values.append(_small(features.get(name)))

    def _records(self) -> Iterator[tuple[int, bytes]]:
        position = 0
        while position < self._num_bytes:
            record = self._record(position)
            yield position, record
            position += 16 + len(record)

    def _record(self, position: int) -> bytes:
        head = self._read(position, 12)
        if position == 0 and head[:2] == b"\x1f\x8b":
            raise UserError(f"{self._uri} is compressed, which cannot be read in place; gunzip it")
        (length,) = struct.unpack_from("<Q", head)
        if _checksum(head[:8]) != head[8:]:
            raise damaged(self._uri, "TFRecord file", f"checksum of the length at byte {position}")
        if length > min(_MAX_RECORD_BYTES, self._num_bytes - position - 16):
            raise damaged(self._uri, "TFRecord file", f"a record of {length} bytes at byte {position}")
        body = self._read(position + 12, length + 4)
        if _checksum(body[:-4]) != body[-4:]:
            raise damaged(self._uri, "TFRecord file", f"checksum of the record at byte {position}")
        return body[:-4]

    def _read(self, position: int, num_bytes: int) -> bytes:
        self._file.seek(position)
        found = self._file.read(num_bytes)
        if len(found) < num_bytes:
            raise damaged(self._uri, "TFRecord file", f"it ends within the record at byte {position}")
        return found

    def _features(self, record: bytes) -> dict[str, tuple[str, Sequence[Any]]]:
        """Return kind and values of each feature."""
        from google.protobuf.message import DecodeError
        from tfrecord import example_pb2

        try:
            example = example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue] -- made at run time
        except DecodeError:
            raise UserError(f"{self._uri} holds records that are no tf.train.Example; write it as such") from None
        found = {}
        for name, feature in example.features.feature.items():
            kind = feature.WhichOneof("kind")
            if kind:
                found[name] = kind, getattr(feature, kind).value
        return found


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C, as records store it."""
    from crc32c import crc32c

    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF)


def _type_of(kind: str, values: Sequence[Any]) -> pa.DataType:
    if kind == "bytes_list" and len(values) == 1 and _is_text(values[0]):
        return pa.string()
    return _KINDS[kind] if len(values) <= 1 else pa.list_(pa.string() if kind == "bytes_list" else _KINDS[kind])


def _wider(known: pa.DataType | None, found: pa.DataType) -> pa.DataType:
    """Return the type of a feature that has been of both types: bytes that are no text once are none."""
    return found if known is None or known == pa.string() else known


def _is_text(value: bytes) -> bool:
    try:
        return len(value) <= 1024 and value.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _small(found: tuple[str, Sequence[Any]] | None) -> Any:
    """Return a value as a label, split or group may be; a large one is cut, since it is none."""
    if found is None or not found[1]:
        return None
    values = [value[:1025] if isinstance(value, bytes) else value for value in found[1][:1025]]
    return values[0] if len(values) == 1 else values


def _column(values: list[Any], name: str, uri: str) -> pa.Array:
    """Return a column; texts are decoded, and single values among lists are lists of one."""
    if any(isinstance(value, list) for value in values):
        values = [value if isinstance(value, list) or value is None else [value] for value in values]
    try:
        return pa.array([_decoded(value) for value in values])
    except (UnicodeDecodeError, pa.ArrowException):
        raise UserError(
            f"feature {name} of {uri} is of several types, or no text in UTF-8; name another by --labels column:NAME"
        ) from None


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(element) for element in value]
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def open_rows(storage: Storage, path: str, version: str) -> Iterator[TfRecordTable]:
    uri = storage.join(path)
    try:
        import crc32c  # noqa: F401
        import tfrecord  # noqa: F401
    except ImportError:
        raise missing(uri, "a TFRecord file", "tfrecord") from None
    with storage.open_input(path) as file:
        yield TfRecordTable(file, uri, storage.stat(path).num_bytes)
