"""MosaicML's MDS by the reader of mosaicml-streaming. A shard is one file and one group; `index.json` describes it.

The library reads files of this machine that are not compressed: others are copied or unpacked while they are open.
Columns of type pkl, which would be unpickled, are never decoded.
"""

import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mae_core.errors import UserError
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import Content, content_of, damaged, is_damage, missing
from pipelines.storage import Storage

NAME = re.compile(r".*\.mds(?:\.(?:br|bz2|gz|snappy|zstd))?")
INDEX = "index.json"
COMPRESSED = re.compile(r".*\.mds\.(br|bz2|gz|snappy|zstd)")
INSTALL = "--no-deps mosaicml-streaming brotli catalogue cramjam python-snappy xxhash zstd"
# Its requirements exclude NumPy 2.2 and transformers 5, which other parts of this project use.
_ENCODED = ("jpeg", "png", "bytes")
_INT = re.compile(r"u?int\d*|str_int")
_FLOAT = re.compile(r"float\d+|str_float")
_CODECS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "zstd": "zstd"}
_CHUNK_BYTES = 2**20
# A copy of 64 bytes takes three.
_MAX_SNAPPY_RATIO = 22
# Offsets in a shard have 32 bits.
_MAX_SHARD_BYTES = 2**32
# Modes whose pixels are all that PIL's encoding needs; a palette is not among what it stores.
_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16")


class MdsTable:
    num_groups = 1

    def __init__(self, reader: Any, uri: str, num_bytes: int) -> None:
        self._reader, self._uri, self._num_bytes = reader, uri, num_bytes
        self.passed_over = PassedOver()
        self._kinds = dict(zip(reader.column_names, reader.column_encodings))
        self.schema = pa.schema([pa.field(name, _type_of(kind)) for name, kind in self._kinds.items()])

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        return range(self._reader.samples), self._num_bytes // max(1, self._reader.samples)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        found: dict[str, list[Any]] = {name: [] for name in columns}
        for row in range(self._reader.samples):
            cells = self._cells(row)
            for name in columns:
                found[name].append(self._decoded(name, cells[name]))
        return pa.table({name: pa.array(values, self.schema.field(name).type) for name, values in found.items()})

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        kind = self._kinds[column]
        for row in rows:
            cell = self._cells(row)[column]
            if kind in _ENCODED:
                yield content_of(cell)
            elif kind == "pil":
                yield _from_pil(cell)
            else:
                file = io.BytesIO()
                np.save(file, self._decoded(column, cell), allow_pickle=False)
                yield content_of(file.getvalue())

    def _cells(self, row: int) -> dict[str, bytes]:
        """Split a sample into its columns, as the reader's `decode_sample` does before it decodes them."""
        data, at, sizes = self._reader.get_sample_data(row), 0, []
        for size in self._reader.column_sizes:
            sizes.append(size or int.from_bytes(data[at : at + 4], "little"))
            at += 0 if size else 4
        if at + sum(sizes) != len(data):
            raise damaged(self._uri, "MDS shard", f"sample {row} has {len(data)} bytes, not {at + sum(sizes)}")
        cells = {}
        for name, size in zip(self._reader.column_names, sizes):
            cells[name], at = data[at : at + size], at + size
        return cells

    def _decoded(self, name: str, cell: bytes) -> Any:
        from streaming.base.format.mds.encodings import (  # pyright: ignore[reportMissingImports]
            is_mds_encoding_safe,
            mds_decode,
        )

        kind = self._kinds[name]
        if not is_mds_encoding_safe(kind):
            raise UserError(f"column {name} of {self._uri} is pickled ({kind}), and nothing is unpickled; name another")
        found = mds_decode(kind, cell)
        return found.item() if isinstance(found, np.generic) else found


def _type_of(kind: str) -> pa.DataType:
    if kind in _ENCODED or kind == "pil" or kind.startswith("ndarray"):
        return pa.binary()
    if _INT.fullmatch(kind):
        return pa.int64()
    if _FLOAT.fullmatch(kind):
        return pa.float64()
    return pa.string() if kind == "str" else pa.struct([])


def _from_pil(cell: bytes) -> Content:
    """Return an image that PIL's encoding stores as pixels, as PNG."""
    from streaming.base.format.mds.encodings import mds_decode  # pyright: ignore[reportMissingImports]

    width, height, num_mode = (int.from_bytes(cell[at : at + 4], "little") for at in (0, 4, 8))
    mode = cell[12 : 12 + num_mode].decode(errors="replace")
    if mode not in _MODES:
        return ValueError(f"unsupported pixels: MDS's pil of mode {mode}, which stores no palette; write it as png")
    if width * height > 8 * len(cell):
        return ValueError(f"damaged image: {width} x {height} pixels in {len(cell)} bytes")
    try:
        image, file = mds_decode("pil", cell), io.BytesIO()
        image.save(file, "PNG", compress_level=1)
    except (ValueError, OSError) as error:
        return ValueError(f"damaged image: {error}")
    return content_of(file.getvalue())


@contextmanager
def open_rows(storage: Storage, path: str, version: str) -> Iterator[MdsTable]:
    uri = storage.join(path)
    try:
        from streaming.base.format.mds.reader import MDSReader  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing(uri, "a shard of MosaicML's MDS", "mosaicml-streaming", INSTALL) from None
    about = _about(storage, path)
    try:
        num_bytes = int(about["raw_data"]["bytes"])
        if not 0 <= about["samples"] <= num_bytes // 4 <= _MAX_SHARD_BYTES // 4:
            raise ValueError(f"{about['samples']} samples in {num_bytes} bytes")
        with _raw_file(storage, path, num_bytes) as file:
            raw = {**about["raw_data"], "basename": file.name}
            reader = MDSReader.from_json(str(file.parent), "", {**about, "raw_data": raw, "zip_data": None})
            yield MdsTable(reader, uri, num_bytes)
    except (IndexError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        if not is_damage(error):
            raise
        raise damaged(uri, "MDS shard", error) from None
    except ValueError as error:
        if type(error) is ValueError:
            raise damaged(uri, "MDS shard", error) from None
        raise


@contextmanager
def _raw_file(storage: Storage, path: str, num_bytes: int) -> Iterator[Path]:
    """Give the shard as a file of this machine that is not compressed: a copy while the block runs, unless it is one.

    Raises ValueError if it does not have the size that its index says.
    """
    ending = COMPRESSED.fullmatch(path.lower())
    if storage.is_local and not ending:
        if (found := storage.stat(path).num_bytes) != num_bytes:
            raise ValueError(f"{found} bytes, but {INDEX} says {num_bytes}")
        yield Path(storage.join(path))
        return
    with tempfile.TemporaryDirectory(prefix="mae-mds-") as folder:
        file = Path(folder) / "shard.mds"
        with storage.open_input(path) as source, file.open("wb") as target:
            for chunk in _chunks(source, ending[1] if ending else "", num_bytes):
                target.write(chunk)
        if (found := file.stat().st_size) != num_bytes:
            raise ValueError(f"{found} bytes or more, but {INDEX} says {num_bytes}")
        yield file


def _chunks(source: Any, ending: str, num_bytes: int) -> Iterator[bytes]:
    """Yield the content, at most one chunk more than `num_bytes`, whatever a compressed file unpacks to."""
    if ending == "snappy":
        content = source.read(num_bytes + _CHUNK_BYTES)
        if num_bytes > _MAX_SNAPPY_RATIO * len(content):
            raise ValueError(f"{len(content)} bytes of snappy cannot hold {num_bytes}")
        yield pa.decompress(content, decompressed_size=num_bytes, codec="snappy", asbytes=True)
        return
    stream = pa.CompressedInputStream(source, _CODECS[ending]) if ending else source
    done = 0
    while done <= num_bytes and (chunk := stream.read(_CHUNK_BYTES)):
        done += len(chunk)
        yield chunk


def _about(storage: Storage, path: str) -> dict[str, Any]:
    """Return what the index says of a shard. Raises UserError if it is missing, or does not."""
    folder, slash, name = path.rpartition("/")
    index = folder + slash + INDEX
    try:
        shards = _shards(storage, index, storage.stat(index).version)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError) or not (is_damage(error) or isinstance(error, FileNotFoundError)):
            raise
        raise damaged(storage.join(index), "index of MDS", error) from None
    if name not in shards:
        raise UserError(f"{storage.join(index)} does not name {name}; remove the shard, or copy its index again")
    return shards[name]


@lru_cache(maxsize=64)
def _shards(storage: Storage, index: str, version: str) -> dict[str, dict[str, Any]]:
    """Return what an index says of each shard, by the names of the file and of its compressed form.

    Raises UserError if a shard is missing, whose samples would be missing too.
    """
    folder, found = index[: -len(INDEX)], {}
    there = {path[len(folder) :] for path, _ in storage.list(folder.rstrip("/"))}
    for about in json.loads(storage.read(index))["shards"]:
        names = [str(about[key]["basename"]) for key in ("raw_data", "zip_data") if about.get(key)]
        if not any(Path(name).name in there for name in names):
            raise UserError(f"{storage.join(index)} names {names[0]}, which is missing; copy it again")
        found |= dict.fromkeys(names, about)
    return found
