"""Read row groups of shards with one request each; the metadata of a shard is read once."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from pipelines.storage import open_storage
from pipelines.storage.ranges import RangeFile, Ranges

_TAIL_BYTES = 2**16
_MAGIC = b"PAR1"
# A shard's metadata is some 100 kB; a process that reads more shards than this at random reads some of it again.
_MAX_OPEN = 64


class RowGroups:
    """Reads row groups of the shards below a URI, from any thread; a copy in another process starts empty."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._storage = open_storage(uri)
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return RowGroups, (self._uri,)

    def read(self, path: str, group: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a row group. Raises OSError if the shard cannot be read, UserError if it is damaged."""
        shard = self._shard(path)
        with self._named_damage(path):
            start, stop = shard.span(group, columns)
        piece = _Piece(start, shard.ranges.read(start, stop - start), shard.ranges.num_bytes)
        with (
            self._named_damage(path),
            pq.ParquetFile(
                pa.PythonFile(RangeFile(piece), mode="r"), metadata=shard.metadata, pre_buffer=False
            ) as file,
        ):
            return file.read_row_group(group, columns=list(columns), use_threads=False)

    def _shard(self, path: str) -> "_Shard":
        with self._lock:
            shard = self._open.pop(path, None)
            if shard is not None:
                self._open[path] = shard
                return shard
        ranges = self._storage.ranges(path)
        tail = _tail(ranges)
        with self._named_damage(path):
            shard = _Shard(ranges, _metadata(tail, ranges.num_bytes))
        with self._lock:
            self._open[path] = shard
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return shard

    @contextmanager
    def _named_damage(self, path: str) -> Iterator[None]:
        """Turn what pyarrow raises for bytes already read into a UserError that names the shard."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, IndexError, OverflowError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            where = self._storage.join(path)
            raise UserError(f"shard {where} is damaged ({reason}); run `mae prepare` again") from None


@dataclass(frozen=True)
class _Shard:
    ranges: Ranges
    metadata: pq.FileMetaData

    def span(self, group: int, columns: Sequence[str]) -> tuple[int, int]:
        """Return the byte range [start, stop) of the columns. Raises UserError if it is not within the file."""
        if group >= self.metadata.num_row_groups:
            raise UserError(f"it has no row group {group}")
        found = self.metadata.row_group(group)
        chunks = [found.column(i) for i in range(found.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        starts = [
            chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset for chunk in chunks
        ]
        stops = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)]
        start, stop = min(starts, default=-1), max(stops, default=-1)
        if not 0 <= start <= stop <= self.ranges.num_bytes:
            raise UserError(f"row group {group} lies outside the file")
        return start, stop


def _tail(ranges: Ranges) -> bytes:
    """Read the end of a file with its metadata; a second read is needed only if it is longer than usual."""
    num_bytes = ranges.num_bytes
    tail = ranges.read(max(0, num_bytes - _TAIL_BYTES), min(num_bytes, _TAIL_BYTES))
    wanted = min(num_bytes, int.from_bytes(tail[-8:-4], "little") + 8)
    if tail[-4:] == _MAGIC and wanted > len(tail):
        tail = ranges.read(num_bytes - wanted, wanted)
    return tail


def _metadata(tail: bytes, num_bytes: int) -> pq.FileMetaData:
    """Parse the metadata at the end of a file. Raises UserError, or a pyarrow error, if it is damaged."""
    if tail[-4:] != _MAGIC:
        raise UserError("it is not a whole Parquet file")
    piece = _Piece(num_bytes - len(tail), tail, num_bytes)
    return pq.read_metadata(pa.PythonFile(RangeFile(piece), mode="r"))


class _Piece:
    """A file of which one piece has been read: reading elsewhere is an error, reading within it copies nothing."""

    def __init__(self, start: int, content: bytes, num_bytes: int) -> None:
        self._start, self._content, self._num_bytes = start, memoryview(content), num_bytes

    def size(self) -> int:
        return self._num_bytes

    def read_at(self, num_bytes: int, offset: int) -> memoryview:
        first = offset - self._start
        if first < 0 or first + num_bytes > len(self._content):
            raise UserError("it points outside what was read of it")
        return self._content[first : first + num_bytes]
