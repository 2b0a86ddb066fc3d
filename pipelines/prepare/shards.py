"""Write one slice of a sorted listing to shards: the stored images, with the metadata that training needs."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mae_core.randomness import Purpose, uniform_numpy
from pipelines.config import PrepareConfig
from pipelines.images.decode import decode, inspect
from pipelines.images.encode import encode
from pipelines.prepare.quarantine import Quarantine
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import DIGEST_BYTES, SliceSummary, WrittenShard
from pipelines.sources import Place
from pipelines.sources.reading import Content
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


@dataclass(frozen=True)
class _Row:
    split: str
    digest: bytes
    values: tuple[Any, ...]
    """Column values in the order of SCHEMA."""
    pixels: NDArray[np.uint8]


def write_slice(
    part: Slice, place: Place, out: Storage, config: PrepareConfig, skip: frozenset[int] = frozenset()
) -> SliceSummary:
    """Write the slice's shards and quarantine file, omitting images at positions `skip`. Deterministic to the byte."""
    summary = SliceSummary(number=part.number, num_entries=len(part.entries))
    quarantine = Quarantine()
    with ExitStack() as stack:
        writers: dict[str, _ShardWriter] = {}
        for position, content in enumerate(place.contents(part.entries)):
            try:
                row = _examine(part, position, content, config)
            except ValueError as error:
                known = content if isinstance(content, bytes) else b""
                quarantine.add(text_of(part.entries[position].name), str(error), known)
                summary.note(None)
                continue
            summary.note(row.split, row.digest)
            if position in skip:
                continue
            if row.split not in writers:
                path = part.shard(row.split)
                writers[row.split] = _ShardWriter(row.split, path, stack.enter_context(out.create(path)), config)
                stack.callback(writers[row.split].abandon)
            writers[row.split].add(row.values)
            summary.count(row.split, row.pixels)
        summary.shards = [writer.close() for _, writer in sorted(writers.items())]
    quarantine.write(out, part.quarantine)
    summary.reasons = quarantine.reasons
    return summary


def _examine(part: Slice, position: int, content: Content, config: PrepareConfig) -> _Row:
    """Decode an image and return its row. Raises ValueError with the reason for quarantine."""
    if isinstance(content, ValueError):
        raise content
    header = inspect(content, config.max_pixels)
    pixels = decode(content, header.channels, header.orientation)
    sha256 = hashlib.sha256(content).digest()
    split = part.folder or "train"
    if part.holds_out:
        share = uniform_numpy(config.seed, Purpose.HOLDOUT, int.from_bytes(sha256[:8], "little"))
        split = "val" if share < config.val_fraction else split
    label = part.labels[position]
    stored = encode(content, header, pixels, config.encode)
    values = (
        stored.content,
        None if label < 0 else label,
        stored.height_px,
        stored.width_px,
        stored.orientation,
        stored.segment_offsets,
        text_of(part.entries[position].name),
    )
    return _Row(split, sha256[:DIGEST_BYTES], values, pixels)


def text_of(path: str) -> str:
    """Return an entry's name as column `source` holds it: in valid UTF-8, with replacement characters."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


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
