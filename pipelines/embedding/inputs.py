"""What `mae embed` and `mae curate` read: a prepared dataset, or any source of images, cut into parts.

The parts depend on the images and the batch alone, so that every image is always in the same batch.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest
from pipelines.dataset.row_groups import RowGroups
from pipelines.prepare.shards import text_of
from pipelines.prepare.slices import Tally, check_splits, class_names, listing_digest
from pipelines.sources import Entry, Place, open_source
from pipelines.sources.entry import fields_of
from pipelines.sources.reading import Content
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import open_storage

_COLUMNS = ("image", "label", "orientation", "source")
# Most bytes of encoded images in a part, as listed.
_PART_BYTES = 256 * 2**20
# A dataset has at least this many parts, if each still fills a batch: they keep many actors busy to the end.
_FEWEST_PARTS = 64


class Record(NamedTuple):
    """One image as it is read."""

    id: int
    name: str
    """Its name in the source."""
    label: str | None
    content: Content
    orientation: int | None = None
    """EXIF orientation, if the header was read before; otherwise it must be read, and the image checked."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive images of one split: rows of a shard, or entries of a source's sorted listing."""

    number: int
    first_id: int
    num_rows: int
    split: str
    shard: str = ""
    first_row: int = 0
    rows_per_group: int = 0
    entries: tuple[Entry, ...] = ()

    @property
    def table(self) -> str:
        """Path of the file with the part's results."""
        return f"parts/part-{self.number:05d}.parquet"

    @property
    def quarantine(self) -> str:
        """Path of the file with the part's unreadable images."""
        return f"quarantine/part-{self.number:05d}.parquet"

    @property
    def outputs(self) -> list[str]:
        """Every file that computing the part may write."""
        return [self.table, self.quarantine]

    def to_json(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["entries"] = [fields_of(entry) for entry in self.entries]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Part":
        values = json.loads(content)
        return cls(**values | {"entries": tuple(Entry(*fields) for fields in values["entries"])})


class Reader(Protocol):
    """Reads the images of parts, in any process."""

    def records(self, part: Part) -> Iterator[Record]:
        """Yield the part's images in order. Raises OSError if the store fails, UserError for a damaged shard."""
        ...


class Input(Protocol):
    """An opened input. Close it with its context manager."""

    @property
    def num_found(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What the results depend on: the digest of the dataset, or of the source's listing."""
        ...

    @property
    def reader(self) -> Reader: ...

    def parts(self, rows_per_part: int, batch: int) -> Iterator[Part]:
        """Yield the parts in order."""
        ...


def open_input(uri: str, stack: ExitStack) -> Input:
    """Open a prepared dataset or a source; `stack` frees what it holds.

    Raises FileNotFoundError or UserError if the URI names neither, or if a source has images both inside and outside
    split folders.
    """
    storage = open_storage(uri)
    if is_prepared(storage):
        return _Dataset(storage.uri, read_manifest(storage))
    return _Source(uri, stack)


def rows_of_part(num_found: int, rows_per_part: int, batch: int) -> int:
    """Return the most rows of a part: full batches, and fewer than `rows_per_part` if there would be few parts."""
    return max(1, min(rows_per_part, max(num_found // _FEWEST_PARTS, batch)) // batch) * batch


def records_of(uri: str, ids: Sequence[int], identity: dict[str, Any]) -> Iterator[Record]:
    """Yield the images of these ids, in ascending order. Raises UserError if the URI holds other images now."""
    wanted = sorted(set(ids))
    with ExitStack() as stack:
        found = open_input(uri, stack)
        if found.identity != identity:
            raise UserError(f"{uri} has changed since it was read; give its place of then by --source, or start again")
        # Batches of one row: a part for each image, of which only those wanted are read.
        at = 0
        for part in found.parts(1, 1):
            if at < len(wanted) and part.first_id == wanted[at]:
                yield from found.reader.records(part)
                at += 1


class _Dataset:
    """A prepared dataset: ids are sample ids."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self._manifest = manifest
        self.num_found = sum(split.num_rows for split in manifest.splits.values())
        self.identity = {"kind": "prepared dataset", "digest": manifest.digest}
        self.reader = _ShardReader(RowGroups(uri), manifest)

    def parts(self, rows_per_part: int, batch: int) -> Iterator[Part]:
        rows, number = rows_of_part(self.num_found, rows_per_part, batch), 0
        shards = [(shard, split) for split, found in self._manifest.splits.items() for shard in found.shards]
        for shard, split in sorted(shards, key=lambda pair: pair[0].first_id):
            for first in range(0, shard.num_rows, rows):
                yield Part(
                    number=number,
                    first_id=shard.first_id + first,
                    num_rows=min(rows, shard.num_rows - first),
                    split=split,
                    shard=shard.path,
                    first_row=first,
                    rows_per_group=shard.rows_per_group,
                )
                number += 1


@dataclass(frozen=True)
class _ShardReader:
    row_groups: RowGroups
    manifest: Manifest

    def records(self, part: Part) -> Iterator[Record]:
        size, stop, number = part.rows_per_group, part.first_row + part.num_rows, part.first_id
        for group in range(part.first_row // size, -(-stop // size)):
            table: pa.Table = self.row_groups.read(part.shard, group, _COLUMNS)
            first = max(part.first_row - group * size, 0)
            for row in table.slice(first, min(stop - group * size, size) - first).to_pylist():
                label = self.manifest.label_name(row["label"])
                yield Record(number, row["source"], label, row["image"], row["orientation"])
                number += 1


class _Source:
    """A source that is read in place: ids are positions in the sorted listing."""

    def __init__(self, uri: str, stack: ExitStack) -> None:
        source, tally = open_source(uri), Tally()
        self._entries = stack.enter_context(closing(SortedEntries(tally.counting(source.entries()))))
        source.passed_over.report(uri)
        check_splits(tally, uri)
        self.num_found = tally.num_entries
        self.identity = {"kind": "source", "digest": listing_digest(self._entries)}
        self.reader = _EntryReader(source.place, bool(class_names(tally, source, SourceConfig())))

    def parts(self, rows_per_part: int, batch: int) -> Iterator[Part]:
        rows, number, first_id, num_bytes = rows_of_part(self.num_found, rows_per_part, batch), 0, 0, 0
        waiting: list[Entry] = []

        def complete() -> Part:
            split = waiting[0].split or "train"
            return Part(number=number, first_id=first_id, num_rows=len(waiting), split=split, entries=tuple(waiting))

        for entry in self._entries:
            is_full = len(waiting) == rows or (num_bytes >= _PART_BYTES and len(waiting) % batch == 0)
            if waiting and (is_full or entry.split != waiting[0].split):
                yield complete()
                number, first_id, num_bytes, waiting = number + 1, first_id + len(waiting), 0, []
            waiting.append(entry)
            num_bytes += entry.num_bytes
        if waiting:
            yield complete()


@dataclass(frozen=True)
class _EntryReader:
    place: Place
    is_labelled: bool

    def records(self, part: Part) -> Iterator[Record]:
        for position, content in enumerate(self.place.contents(part.entries)):
            entry = part.entries[position]
            label = entry.label if self.is_labelled and entry.label else None
            yield Record(part.first_id + position, text_of(entry.name), label, content)
