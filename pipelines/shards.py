"""One slice of a sorted listing becomes shards: images as they were stored, with what training must know of them."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mae_core.randomness import Purpose, uniform_numpy
from pipelines.config import PrepareConfig
from pipelines.decode import decode, inspect
from pipelines.encode import encode
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
QUARANTINE_SCHEMA = pa.schema(
    [pa.field("source", pa.string()), pa.field("reason", pa.string()), pa.field("num_bytes", pa.int64())]
)
DIGEST_BYTES = 16
_READ_THREADS = 8
_READ_AHEAD = 64
_LEVELS = np.arange(256)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A contiguous part of the listing within one split folder ("" where the source has none)."""

    number: int
    """Among all slices; names the quarantine file."""
    part: int
    """Among the slices of its folder; names the shards."""
    folder: str
    holds_out: bool
    """Whether a part of it becomes split val."""
    paths: list[str]
    labels: list[int]
    """By path; -1 for unlabelled."""


@dataclass(kw_only=True)
class PixelSums:
    """Exact sums over the pixels of gray and of colour images, so that their order cannot matter."""

    num_gray: int = 0
    gray: tuple[int, int] = (0, 0)
    num_colour: int = 0
    colour: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)] * 3)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        sums = [_sums(pixels[:, :, c]) for c in range(pixels.shape[2])]
        self.merge(
            PixelSums(num_gray=pixels.size, gray=sums[0])
            if len(sums) == 1
            else PixelSums(num_colour=pixels.size // 3, colour=sums)
        )

    def merge(self, other: "PixelSums") -> None:
        self.num_gray += other.num_gray
        self.gray = _add(self.gray, other.gray)
        self.num_colour += other.num_colour
        self.colour = [_add(a, b) for a, b in zip(self.colour, other.colour)]

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Of each channel on the scale 0 to 1; without colour, of one channel; otherwise gray counts for all."""
        count = max(1, self.num_gray + self.num_colour)
        totals = [_add(self.gray, colour) for colour in self.colour] if self.num_colour else [self.gray]
        means = [total / count for total, _ in totals]
        variances = [squares / count - mean**2 for (_, squares), mean in zip(totals, means)]
        return [mean / 255 for mean in means], [max(0.0, v) ** 0.5 / 255 for v in variances]


@dataclass(kw_only=True)
class WrittenShard:
    split: str
    path: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Row:
    position: int
    split: str
    digest: bytes
    values: tuple[Any, ...]
    """In the order of SCHEMA."""
    pixels: NDArray[np.uint8]


@dataclass(kw_only=True)
class SliceSummary:
    """What became of a slice. Positions, splits and digests are of all whole images, those left out included."""

    number: int
    shards: list[WrittenShard] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    sums: dict[str, PixelSums] = field(default_factory=dict)
    """By split."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Heights and widths that occur, two at most."""
    positions: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    """DIGEST_BYTES of the sha256 of each image's bytes."""

    def note(self, position: int, row: _Row) -> None:
        self.positions.append(position)
        self.splits.append(row.split)
        self.digests += row.digest

    def count(self, row: _Row) -> None:
        self.sums.setdefault(row.split, PixelSums()).add(row.pixels)
        size = (row.values[2], row.values[3])
        if size not in self.sizes and len(self.sizes) < 2:
            self.sizes.append(size)


def write_slice(
    part: Slice, source: Storage, out: Storage, config: PrepareConfig, skip: frozenset[int] = frozenset()
) -> SliceSummary:
    """The slice's shards and quarantine file are written, the same bytes each time; images at `skip` are left out."""
    summary = SliceSummary(number=part.number)
    quarantine: list[tuple[str, str, int]] = []
    with ExitStack() as stack:
        writers: dict[str, _ShardWriter] = {}
        for position, content in enumerate(_contents(part, source)):
            try:
                row = _examine(part, position, content, config)
            except ValueError as error:
                quarantine.append((_text(part.paths[position]), str(error), len(content or b"")))
                continue
            summary.note(position, row)
            if position in skip:
                continue
            if row.split not in writers:
                path = f"{row.split}/part-{part.part:05d}.parquet"
                writers[row.split] = _ShardWriter(row.split, path, stack.enter_context(out.create(path)), config)
            writers[row.split].add(row.values)
            summary.count(row)
        summary.shards = [writer.close() for _, writer in sorted(writers.items())]
    if quarantine:
        columns = [pa.array(column, kind) for column, kind in zip(zip(*quarantine), QUARANTINE_SCHEMA.types)]
        with out.create(f"quarantine/part-{part.number:05d}.parquet") as file:
            pq.write_table(pa.Table.from_arrays(columns, schema=QUARANTINE_SCHEMA), file)
    summary.reasons = dict(sorted(Counter(reason.split(":")[0] for _, reason, _ in quarantine).items()))
    return summary


def _contents(part: Slice, source: Storage) -> Iterator[bytes | None]:
    """The bytes of each file in order, a few read ahead; None for one that is gone or may not be read."""

    def read(path: str) -> bytes | None:
        try:
            return source.read(path)
        except (FileNotFoundError, PermissionError):
            return None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(part.paths), _READ_AHEAD):
            yield from pool.map(read, part.paths[start : start + _READ_AHEAD])


def _examine(part: Slice, position: int, content: bytes | None, config: PrepareConfig) -> _Row:
    """The row of a whole image. Raises ValueError with the reason for quarantine."""
    if content is None:
        raise ValueError("cannot be read")
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
        _text(part.paths[position]),
    )
    return _Row(position, split, sha256[:DIGEST_BYTES], values, pixels)


def _text(path: str) -> str:
    """The path as UTF-8; bytes of a file name that are none become replacement characters."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


class _ShardWriter:
    """A Parquet file written row group by row group, its sha256 taken on the way."""

    def __init__(self, split: str, path: str, file: IO[bytes], config: PrepareConfig) -> None:
        self._split, self._path, self._rows_per_group = split, path, config.rows_per_group
        self._file = _Hashed(file)
        # Encoded images do not compress, and statistics of them would copy whole images into the footer.
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._file, mode="w"),
            SCHEMA,
            compression={name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names},  # pyright: ignore[reportArgumentType] -- a codec a column is allowed
            use_dictionary=False,
            write_statistics=[name for name in SCHEMA.names if name not in ("image", "segment_offsets")],  # pyright: ignore[reportArgumentType]
        )
        self._rows: list[tuple[Any, ...]] = []
        self._num_rows = 0

    def add(self, values: tuple[Any, ...]) -> None:
        self._rows.append(values)
        if len(self._rows) == self._rows_per_group:
            self._flush()

    def close(self) -> WrittenShard:
        """The file is complete."""
        self._flush()
        self._parquet.close()
        return WrittenShard(
            split=self._split,
            path=self._path,
            num_rows=self._num_rows,
            num_bytes=self._file.num_bytes,
            sha256=self._file.sha256.hexdigest(),
        )

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, kind) for column, kind in zip(zip(*self._rows), SCHEMA.types)]
            table = pa.Table.from_arrays(columns, schema=SCHEMA)
            self._parquet.write_table(table, row_group_size=self._rows_per_group)
            self._num_rows += len(self._rows)
            self._rows = []


class _Hashed:
    """A file written in sequence that knows its size and sha256."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The block that opened the file closes it."""


def _sums(values: NDArray[np.uint8]) -> tuple[int, int]:
    """Sum and sum of squares, exact."""
    counts = np.bincount(values.ravel(), minlength=256)
    return int(counts @ _LEVELS), int(counts @ _LEVELS**2)


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]
