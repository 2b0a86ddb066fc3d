"""MosaicML's MDS by the reader of mosaicml-streaming. A shard is one file and one group; `index.json` describes it.

Columns of type pkl, which would be unpickled, are never decoded.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mae_core.errors import UserError
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import Content, content_of, damaged, folder_of, missing
from pipelines.storage import Storage

NAME = re.compile(r".*\.mds(?:\.(?:br|bz2|gz|snappy|zstd))?")
INDEX = "index.json"
INSTALL = "--no-deps mosaicml-streaming brotli catalogue cramjam python-snappy xxhash zstd"
# Its requirements exclude NumPy 2.2 and transformers 5, which other parts of this project use.
_ENCODED = ("jpeg", "png", "bytes")
_INT = re.compile(r"u?int\d*|str_int")
_FLOAT = re.compile(r"float\d+|str_float")
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
    full = Path(folder_of(storage, path, "MDS shards"))
    try:
        from streaming.base.format.mds.reader import MDSReader  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing(str(full), "a shard of MosaicML's MDS", "mosaicml-streaming", INSTALL) from None
    about = _about(full)
    if full.name != about["raw_data"]["basename"]:
        raise UserError(
            f"{full} is compressed, which cannot be read in place; decompress it to "
            f"{about['raw_data']['basename']} (zstd -d, for example)"
        )
    num_bytes = full.stat().st_size
    if num_bytes != about["raw_data"]["bytes"]:
        raise damaged(str(full), "MDS shard", f"{num_bytes} bytes, but {INDEX} says {about['raw_data']['bytes']}")
    try:
        if not 0 <= about["samples"] <= num_bytes // 4:
            raise ValueError(f"{about['samples']} samples in {num_bytes} bytes")
        reader = MDSReader.from_json(str(full.parent), "", about)
        yield MdsTable(reader, str(full), num_bytes)
    except (IndexError, KeyError, TypeError, OSError) as error:
        raise damaged(str(full), "MDS shard", error) from None
    except ValueError as error:
        if type(error) is ValueError:
            raise damaged(str(full), "MDS shard", error) from None
        raise


def _about(shard: Path) -> dict[str, Any]:
    """Return what the index says of a shard. Raises UserError if it is missing, or does not."""
    index = shard.with_name(INDEX)
    try:
        shards = _shards(index, index.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(str(index), "index of MDS", error) from None
    if shard.name not in shards:
        raise UserError(f"{index} does not name {shard.name}; remove the shard, or copy its index again")
    return shards[shard.name]


@lru_cache(maxsize=64)
def _shards(index: Path, version: int) -> dict[str, dict[str, Any]]:
    """Return what an index says of each shard, by the names of the file and of its compressed form.

    Raises UserError if a shard is missing, whose samples would be missing too.
    """
    found = {}
    for about in json.loads(index.read_bytes())["shards"]:
        names = [str(about[key]["basename"]) for key in ("raw_data", "zip_data") if about.get(key)]
        if not any(index.with_name(Path(name).name).exists() for name in names):
            raise UserError(f"{index} names {names[0]}, which is missing; copy it again")
        found |= dict.fromkeys(names, about)
    return found
