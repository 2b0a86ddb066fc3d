"""Write one slice of a sorted listing to shards: the stored images, with the metadata that training needs."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.randomness import Purpose, uniform_numpy
from mae_core.values import limits_of
from pipelines.config import PrepareConfig
from pipelines.dataset.row_groups import RowGroups
from pipelines.images.decode import (
    ImageArray,
    ImageHeader,
    ValueArray,
    data_of,
    decode,
    inspect,
    own_window,
    read_values,
)
from pipelines.images.decode.stored import pack
from pipelines.images.encode import as_png, encode
from pipelines.prepare.kinds import PLAIN, PixelKind
from pipelines.prepare.quarantine import Quarantine
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import DIGEST_BYTES, SliceSummary, WrittenShard
from pipelines.prepare.values import Limits, Mask
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
# Largest difference between a pixel's channels that glass has, which is never quite gray.
_MIN_COLOUR = 20
_LABEL = SCHEMA.get_field_index("label")


@dataclass(frozen=True)
class _Row:
    """One image as it is stored: a file's only one, or one of its frames."""

    content: bytes
    height_px: int
    width_px: int
    orientation: int
    segment_offsets: list[int] | None
    pixels: ValueArray
    valid: Mask | None = None
    limits: Limits | None = None
    suffix: str = ""
    """Appended to the file's name to tell frames apart."""


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
                rows = _examine(content, config, kind, notes)
            except ValueError as error:
                known = content if isinstance(content, bytes) else b""
                quarantine.add(text_of(part.entries[position].name), str(error), known)
                summary.note(None)
                continue
            assert isinstance(content, bytes), "what was examined was read"
            sha256 = hashlib.sha256(content).digest()
            split = _split_of(part, sha256, config)
            summary.note(split, sha256[:DIGEST_BYTES])
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


def _split_of(part: Slice, sha256: bytes, config: PrepareConfig) -> str:
    """Return the split of an image: that of its folder, or val for a share of all, by its content."""
    split = part.folder or "train"
    if part.holds_out:
        share = uniform_numpy(config.seed, Purpose.HOLDOUT, int.from_bytes(sha256[:8], "little"))
        split = "val" if share < config.val_fraction else split
    return split


def _columns(row: _Row, part: Slice, position: int) -> tuple[Any, ...]:
    """Return the column values in the order of SCHEMA."""
    label = part.labels[position]
    name = text_of(part.entries[position].name) + row.suffix
    described = row.height_px, row.width_px, row.orientation, row.segment_offsets
    return row.content, None if label < 0 else label, *described, name


def _examine(content: Content, config: PrepareConfig, kind: PixelKind, notes: list[str]) -> list[_Row]:
    """Decode a file and return its images. Raises ValueError with the reason for quarantine.

    What is done to them that their owner may not expect is added to `notes`.
    """
    if isinstance(content, ValueError):
        raise content
    header = inspect(content, config.max_pixels, config.reading)
    kind.check(header)
    notes += header.notes
    if not kind.is_plain:
        frames = _frames(header, config)
        return [row for frame in frames for row in _rows_of_frame(content, header, frame, config, notes)]
    pixels = decode(content, header.channels, header.orientation, notes=notes)
    if config.tile_px is not None:
        return [_tile_row(pixels[tile], tile) for tile in _kept_tiles(pixels, data_of(content, pixels), config, notes)]
    stored = encode(content, header, pixels, config.encode)
    size = stored.height_px, stored.width_px
    return [_Row(stored.content, *size, stored.orientation, stored.segment_offsets, pixels)]


def tiles_of(height_px: int, width_px: int, side_px: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns of square tiles that cover an image, the last ones overlapping those before.

    An image that is smaller in one dimension is as small there.
    """
    sides = []
    for size in (height_px, width_px):
        starts = [*range(0, max(1, size - side_px), side_px), max(0, size - side_px)]
        sides.append([slice(start, min(start + side_px, size)) for start in dict.fromkeys(starts)])
    return [(rows, columns) for rows in sides[0] for columns in sides[1]]


def _kept_tiles(
    values: ValueArray, valid: Mask | None, config: PrepareConfig, notes: list[str]
) -> list[tuple[slice, slice]]:
    """Return the tiles with enough data and tissue. Raises ValueError if there are none."""
    assert config.tile_px is not None, "asked for tiles"
    if config.min_tissue and (values.dtype != np.uint8 or values.shape[2] != 3):
        raise ValueError("no tissue: only colours of 8 bits show it; leave --min-tissue out")
    kept, reasons = [], {"data": 0, "tissue": 0}
    for tile in tiles_of(values.shape[0], values.shape[1], config.tile_px):
        if valid is not None and valid[tile].mean() < config.min_data:
            reasons["data"] += 1
        elif config.min_tissue and _tissue(values[tile]) < config.min_tissue:
            reasons["tissue"] += 1
        else:
            kept.append(tile)
    for what, count in reasons.items():
        notes += [f"tiles left out for too little {what}"] * count
    if not kept:
        share = config.min_data if reasons["data"] else config.min_tissue
        what = "data" if reasons["data"] else "tissue"
        raise ValueError(f"no {what}: no tile has {what} in {share:.0%} of its pixels")
    return kept


def _tissue(pixels: ImageArray) -> float:
    """Return the share of coloured pixels: stains are, glass is gray or white, and so are pen and dust mostly."""
    return float((np.ptp(pixels, axis=2) > _MIN_COLOUR).mean())


def _tile_row(pixels: ImageArray, tile: tuple[slice, slice]) -> _Row:
    stored = as_png(pixels)
    return _Row(stored.content, stored.height_px, stored.width_px, 1, None, pixels, suffix=_suffix_of(tile))


def _suffix_of(tile: tuple[slice, slice]) -> str:
    return f"@{tile[0].start},{tile[1].start}"


def _frames(header: ImageHeader, config: PrepareConfig) -> range:
    """Return the frames that the config chooses."""
    if config.frames in ("one", "first"):
        return range(1)
    return range(0, header.num_frames, 1 if config.frames == "all" else int(config.frames))


def _rows_of_frame(
    content: bytes, header: ImageHeader, frame: int, config: PrepareConfig, notes: list[str]
) -> list[_Row]:
    """Read a frame, or its tiles, and store its values without loss, with its own value range if it has one.

    Tiles have the range of the image that they are cut from. Raises ValueError if none has enough data.
    """
    values, valid = read_values(content, config.reading, frame, config.max_pixels, notes)
    limits = None
    if config.range[:1] == ("voi",):
        limits = own_window(content, header.channels)
    elif config.range_by == "image":
        shares = config.range_numbers
        own = ValueRange(
            dtype=header.dtype,  # pyright: ignore[reportArgumentType] -- one of the four
            kind=config.range[0],  # pyright: ignore[reportArgumentType] -- checked by the config
            by="image",
            percentiles=(shares[0], shares[1]) if shares else None,
        )
        limits = limits_of(values, own, valid)
    suffix = f"#{frame}" if header.num_frames > 1 and config.frames not in ("one", "first") else ""
    if config.tile_px is None:
        height, width = values.shape[:2]
        return [_Row(pack(values, limits), height, width, 1, None, values, valid, limits, suffix)]
    found = []
    for tile in _kept_tiles(values, valid, config, notes):
        part, mask = values[tile], None if valid is None else valid[tile]
        name = suffix + _suffix_of(tile)
        height, width = part.shape[:2]
        found.append(_Row(pack(part, limits), height, width, 1, None, part, mask, limits, name))
    return found


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
