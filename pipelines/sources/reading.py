"""Read the bytes of entries, in order: files and ranges prefetched by threads, Parquet rows as a stream.

Memory is bounded in bytes, for any size and number of images.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from mae_core.errors import UserError
from pipelines.sources.entry import Entry
from pipelines.sources.rows import PARQUET, open_rows
from pipelines.sources.table_files import MAX_IMAGE_BYTES, Content
from pipelines.storage import Storage, open_storage, stays_inside
from pipelines.storage.listing import LEAVES, check_size

__all__ = ["MAX_IMAGE_BYTES", "Content", "Place"]

_THREADS = 16
_AHEAD_BYTES = 64 * 2**20
_AHEAD_UNITS = 256
# Images that are close together in a tar are read in one request.
_UNIT_BYTES = 4 * 2**20
_GAP_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Place:
    """Where entries are: the storage that their paths are relative to, and how to read their bytes."""

    storage: Storage
    image_column: str = ""
    """Column with the image bytes, such as `image.bytes`, where files have rows."""
    kind_of_rows: str = PARQUET
    """Which files of rows these are, if `image_column` is given."""
    takes_uris: bool = False
    """Whether a path may also be a URI. Only so for a list that the user wrote."""

    def contents(self, entries: Sequence[Entry]) -> Iterator[Content]:
        """Yield the content of each entry. Raises OSError if the store fails, UserError for a damaged file of rows."""
        yield from self._rows(entries) if self.image_column else self._ranges(entries)

    def _ranges(self, entries: Sequence[Entry]) -> Iterator[Content]:
        waiting: deque[tuple[int, Future[list[Content]]]] = deque()
        ahead_bytes = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for unit in _units(entries):
                    size = sum(entry.num_bytes for entry in unit)
                    while waiting and (ahead_bytes + size > _AHEAD_BYTES or len(waiting) >= _AHEAD_UNITS):
                        done_bytes, future = waiting.popleft()
                        ahead_bytes -= done_bytes
                        yield from future.result()
                    waiting.append((size, pool.submit(self._read_unit, unit)))
                    ahead_bytes += size
                while waiting:
                    yield from waiting.popleft()[1].result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _read_unit(self, unit: list[Entry]) -> list[Content]:
        first = unit[0]
        if first.fault:
            return [ValueError(first.fault)]
        try:
            check_size(first.num_bytes, MAX_IMAGE_BYTES)
            if first.offset < 0:
                return [self._file(first.path)]
            _check_inside(first.name)
            end = unit[-1].offset + unit[-1].num_bytes
            content = self.storage.read_range(first.path, first.offset, end - first.offset)
        except (FileNotFoundError, PermissionError):
            return [ValueError("cannot be read") for _ in unit]
        except ValueError as error:
            return [error for _ in unit]
        return [content[entry.offset - first.offset :][: entry.num_bytes] for entry in unit]

    def _file(self, path: str) -> bytes:
        storage = self.storage
        if self.takes_uris and (path.startswith("/") or "://" in path):
            folder, _, path = open_storage(path).uri.rpartition("/")
            storage = open_storage(folder or "/")
        _check_inside(path)
        # Check before opening: opening a pipe would block, and reading a device may never end. A list may name links to
        # anywhere.
        fault = storage.stat(path).fault if storage.is_local else ""
        if fault and not (self.takes_uris and fault == LEAVES):
            raise UserError(fault)
        return storage.read(path, MAX_IMAGE_BYTES)

    def _rows(self, entries: Sequence[Entry]) -> Iterator[Content]:
        for (path, version), chosen in groupby(entries, key=lambda entry: (entry.path, entry.version)):
            with open_rows(self.kind_of_rows, self.storage, path, version) as file:
                for group, wanted in groupby(chosen, key=lambda entry: entry.group):
                    for rows in _ascending([entry.row for entry in wanted]):
                        yield from file.contents(group, rows, self.image_column)


def _ascending(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut rows into runs that ascend: a column of splits orders a file's rows by split."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] < rows[end - 1]:
            yield rows[first:end]
            first = end


def _check_inside(path: str) -> None:
    if not stays_inside(path):
        raise UserError("unsafe name: it is absolute, or has '..', '//' or NUL")


def _units(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Group adjacent entries that are read in one request."""
    unit: list[Entry] = []
    for entry in entries:
        if unit and not _adjoins(unit, entry):
            yield unit
            unit = []
        unit.append(entry)
    if unit:
        yield unit


def _adjoins(unit: list[Entry], entry: Entry) -> bool:
    first, last = unit[0], unit[-1]
    gap = entry.offset - last.offset - last.num_bytes
    return (
        entry.path == first.path
        and not (first.fault or entry.fault)
        and entry.offset >= 0
        and 0 <= gap <= _GAP_BYTES
        and entry.offset + entry.num_bytes - first.offset <= _UNIT_BYTES
        and stays_inside(first.name)
        and stays_inside(entry.name)
    )
