"""Write one slice of a sorted listing to shards: the stored images, with the metadata that training needs."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from mae_core.randomness import Purpose, uniform_numpy
from pipelines.config import PrepareConfig
from pipelines.dataset.row_groups import RowGroups
from pipelines.prepare.kinds import PLAIN, PixelKind
from pipelines.prepare.quarantine import Quarantine
from pipelines.prepare.rows import Row, examine
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import DIGEST_BYTES, SliceSummary, WrittenShard
from pipelines.sources import Place
from pipelines.storage import Storage

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("orientation", pa.int32(), nullable=False),
        pa.field("segment_offsets", pa.list_(pa.int32())),
        pa.field("source", pa.string(), nullable=False),
    ]
)
_LABEL = SCHEMA.get_field_index("label")


def write_slice(
    part: Slice,
    place: Place,
    out: Storage,
    config: PrepareConfig,
    skip: frozenset[int] = frozenset(),
    kind: PixelKind = PLAIN,
) -> SliceSummary:
    """Write the slice's shards and quarantine file, omitting images at positions `skip`. Deterministic to the byte."""
    summary = SliceSummary(number=part.number, num_entries=len(part.entries))
    quarantine = Quarantine()
    with shard_writers(part, out, config) as writers:
        for position, content in enumerate(place.contents(part.entries)):
            notes: list[str] = []
            try:
                rows = examine(content, config, kind, notes)
            except ValueError as error:
                known = content if isinstance(content, bytes) else b""
                quarantine.add(text_of(part.entries[position].name), str(error), known)
                summary.note(None)
                continue
            assert isinstance(content, bytes), "what was examined was read"
            sha256 = hashlib.sha256(content).digest()
            split = _split_of(part, sha256, config)
            summary.note(split, content_digest(content, sha256))
            if position in skip:
                continue
            for row in rows:
                writers.add(split, _columns(row, part, position))
                if kind.is_plain:
                    summary.count(split, row.pixels)
                else:
                    summary.count_values(split, row.pixels, row.valid, row.limits)
            summary.num_further += len(rows) - 1
            summary.add_notes(notes)
        summary.shards = writers.close()
    quarantine.write(out, part.quarantine)
    summary.reasons = quarantine.reasons
    return summary


def content_digest(content: bytes, sha256: bytes) -> bytes:
    """Return what equal images have in common: a prefix of the sha256, for gzip of what follows its header.

    The header has the time of packing and the file's name (RFC 1952, section 2.3).
    """
    start = _gzip_start(content) if content[:3] == b"\x1f\x8b\x08" else 0
    return (hashlib.sha256(memoryview(content)[start:]).digest() if start else sha256)[:DIGEST_BYTES]


def _gzip_start(content: bytes) -> int:
    """Return where the compressed data of the first member begins; 0 if the header is damaged."""
    flags, at = content[3], 10
    if flags & 4:
        at += 2 + int.from_bytes(content[at : at + 2], "little")
    for flag in (8, 16):
        if flags & flag:
            at = content.find(b"\0", at) + 1
            if not at:
                return 0
    return at + (2 if flags & 2 else 0)


def _split_of(part: Slice, sha256: bytes, config: PrepareConfig) -> str:
    """Return the split of an image: that of its folder, or val for a share of all, by its content."""
    split = part.folder or "train"
    if part.holds_out:
        share = uniform_numpy(config.seed, Purpose.HOLDOUT, int.from_bytes(sha256[:8], "little"))
        split = "val" if share < config.val_fraction else split
    return split


def _columns(row: Row, part: Slice, position: int) -> tuple[Any, ...]:
    """Return the column values in the order of SCHEMA."""
    label = part.labels[position]
    name = text_of(part.entries[position].name) + row.suffix
    described = row.height_px, row.width_px, row.orientation, row.segment_offsets
    return row.content, None if label < 0 else label, *described, name


def text_of(path: str) -> str:
    """Return an entry's name as column `source` holds it: in valid UTF-8, with replacement characters."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


@contextmanager
def shard_writers(part: Slice, out: Storage, config: PrepareConfig) -> Iterator["ShardWriters"]:
    """Open the writers of a slice's shards; files that are not complete at the end are discarded."""
    with ExitStack() as stack:
        yield ShardWriters(part, out, config, stack)


class ShardWriters:
    """The shards of one slice: a file for each split that has a row."""

    def __init__(self, part: Slice, out: Storage, config: PrepareConfig, stack: ExitStack) -> None:
        self._part, self._out, self._config, self._stack = part, out, config, stack
        self._writers: dict[str, _ShardWriter] = {}

    def add(self, split: str, values: tuple[Any, ...]) -> None:
        """Add a row, with values in the order of SCHEMA, to the split's shard."""
        if split not in self._writers:
            path = self._part.shard(split)
            file = self._stack.enter_context(self._out.create(path))
            self._writers[split] = _ShardWriter(split, path, file, self._config)
            self._stack.callback(self._writers[split].abandon)
        self._writers[split].add(values)

    def close(self) -> list[WrittenShard]:
        """Complete the files and return their descriptions."""
        return [writer.close() for _, writer in sorted(self._writers.items())]


def rows_of(storage: Storage, shard: WrittenShard, config: PrepareConfig) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a shard, each with its values in the order of SCHEMA.

    Raises UserError if the shard is damaged, or has another number of rows than described.
    """
    row_groups, num_rows = RowGroups(storage.uri), 0
    for group in range(-(-shard.num_rows // config.rows_per_group)):
        table = row_groups.read(shard.path, group, SCHEMA.names)
        num_rows += len(table)
        yield from zip(*(column.to_pylist() for column in table.columns))
    if num_rows != shard.num_rows:
        raise UserError(f"{storage.join(shard.path)} has not its {shard.num_rows} rows; run `mae prepare` again")


class _ShardWriter:
    """Write a Parquet file row group by row group and compute its sha256."""

    def __init__(self, split: str, path: str, file: IO[bytes], config: PrepareConfig) -> None:
        self._split, self._path, self._rows_per_group = split, path, config.rows_per_group
        self._file = _Hashed(file)
        # Encoded images do not compress, and their min/max statistics would copy entire images into the footer.
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            SCHEMA,
            compression={name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names},  # pyright: ignore[reportArgumentType] -- a codec a column is allowed
            use_dictionary=False,
            write_statistics=[name for name in SCHEMA.names if name not in ("image", "segment_offsets")],  # pyright: ignore[reportArgumentType]
        )
        self._rows: list[tuple[Any, ...]] = []
        self._num_rows = self._num_unlabelled = 0

    def add(self, values: tuple[Any, ...]) -> None:
        self._rows.append(values)
        self._num_unlabelled += values[_LABEL] is None
        if len(self._rows) == self._rows_per_group:
            self._flush()

    def close(self) -> WrittenShard:
        """Complete the file and return its description."""
        self._flush()
        self._parquet.close()
        return WrittenShard(
            split=self._split,
            path=self._path,
            num_rows=self._num_rows,
            num_bytes=self._file.num_bytes,
            sha256=self._file.sha256.hexdigest(),
            num_unlabelled=self._num_unlabelled,
        )

    def abandon(self) -> None:
        """Discard further writes, if the file is not complete."""
        self._file.is_abandoned = True
        self._parquet.close()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, kind) for column, kind in zip(zip(*self._rows), SCHEMA.types)]
            table = pa.Table.from_arrays(columns, schema=SCHEMA)
            self._parquet.write_table(table, row_group_size=self._rows_per_group)
            self._num_rows += len(self._rows)
            self._rows = []


class _Hashed:
    """A sequentially written file that counts its bytes and computes their sha256."""

    closed = False
    is_abandoned = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        if self.is_abandoned:
            return len(content)
        self.sha256.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Do nothing: the block that opened the file closes it."""
