"""Row groups come as pyarrow itself reads them, by one request each, and what is damaged is named."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dataset.row_groups import RowGroups
from pipelines.storage.ranges import Ranges

PATH, ROWS, PER_GROUP = "train/part-00000.parquet", 100, 16
COLUMNS = ["image", "orientation", "segment_offsets"]


def table_of(rows: int) -> pa.Table:
    random = np.random.default_rng(0)
    lists = [None if i % 3 == 0 else random.integers(0, 9, i % 5).tolist() for i in range(rows)]
    return pa.table(
        {
            "image": [random.bytes(1000 + i) for i in range(rows)],
            "label": [None if i % 7 == 0 else i for i in range(rows)],
            "orientation": pa.array([i % 8 for i in range(rows)], pa.int8()),
            "segment_offsets": pa.array(lists, pa.list_(pa.int32())),
            "source": [f"a/{i}.jpg" for i in range(rows)],
        }
    )


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: int = ROWS, per_group: int = PER_GROUP) -> Path:
        path = tmp_path / PATH
        path.parent.mkdir()
        codecs = {"image": "NONE", "label": "ZSTD", "orientation": "ZSTD", "source": "ZSTD"}
        # pyarrow's signature has neither codecs nor dictionaries by column, its documentation has both.
        by_column: dict[str, Any] = {
            "compression": {**codecs, "segment_offsets.list.element": "ZSTD"},
            "use_dictionary": ["source"],
        }
        pq.write_table(table_of(rows), path, row_group_size=per_group, **by_column)
        return path

    return write


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every part of a file that is read."""
    found, read = [], Ranges.read
    monkeypatch.setattr(Ranges, "read", lambda self, *span: (found.append(span), read(self, *span))[1])
    return found


@pytest.mark.parametrize("columns", [COLUMNS, ["label"], ["source", "image"]])
def test_it_reads_what_pyarrow_reads(shard: Callable[..., Path], tmp_path: Path, columns: list[str]) -> None:
    whole, reader = pq.ParquetFile(shard()), RowGroups(str(tmp_path))
    assert whole.num_row_groups == 7
    for group in reversed(range(whole.num_row_groups)):
        assert reader.read(PATH, group, columns).equals(whole.read_row_group(group, columns=columns))


def test_a_row_group_is_one_request_and_the_metadata_are_read_once(
    shard: Callable[..., Path], tmp_path: Path, requests: list[tuple[int, int]]
) -> None:
    reader, num_bytes = RowGroups(str(tmp_path)), shard().stat().st_size
    for group in (3, 4, 3):
        reader.read(PATH, group, COLUMNS)
    assert [offset + length for offset, length in requests if offset + length == num_bytes] == [num_bytes]
    assert len(requests) == 4
    assert requests[1] == requests[3] != requests[2]
    assert PER_GROUP * 1000 < requests[1][1] < PER_GROUP * 1400
    # As it goes to another process, too.
    assert copy.copy(reader).read(PATH, 3, COLUMNS).equals(reader.read(PATH, 3, COLUMNS))
    assert len(requests) == 7


def test_metadata_longer_than_the_first_read_of_the_tail(
    shard: Callable[..., Path], tmp_path: Path, requests: list[tuple[int, int]]
) -> None:
    whole, reader = pq.ParquetFile(shard(400, 1)), RowGroups(str(tmp_path))
    assert reader.read(PATH, 399, COLUMNS).equals(whole.read_row_group(399, columns=COLUMNS))
    assert requests[1][1] > requests[0][1] == 2**16


def test_threads_read_at_once(shard: Callable[..., Path], tmp_path: Path) -> None:
    whole, reader = pq.ParquetFile(shard()), RowGroups(str(tmp_path))
    groups = [i % 7 for i in range(140)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda group: reader.read(PATH, group, COLUMNS), groups))
    assert all(table.equals(whole.read_row_group(group, columns=COLUMNS)) for table, group in zip(found, groups))


@pytest.mark.parametrize("kept", [0, 3, 50, 0.5, -1])
def test_a_shard_that_was_cut_off_is_named(shard: Callable[..., Path], tmp_path: Path, kept: float) -> None:
    content = shard().read_bytes()
    (tmp_path / PATH).write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=rf"{PATH} is damaged \(it is not a whole Parquet file\); run `mae prepare`"):
        RowGroups(str(tmp_path)).read(PATH, 0, COLUMNS)


def test_any_flipped_byte_is_an_error_or_a_table(shard: Callable[..., Path], tmp_path: Path) -> None:
    path = shard()
    content, random = path.read_bytes(), np.random.default_rng(1)
    metadata = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    reasons = []
    for _ in range(300):
        flipped = bytearray(content)
        flipped[random.integers(metadata, len(content))] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            RowGroups(str(tmp_path)).read(PATH, 2, COLUMNS)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    assert len(reasons) >= 20
    assert all(PATH in reason for reason in reasons)


def test_what_is_not_there_is_named(shard: Callable[..., Path], tmp_path: Path) -> None:
    shard()
    with pytest.raises(ValueError, match=r"it has no row group 7"):
        RowGroups(str(tmp_path)).read(PATH, 7, COLUMNS)
    with pytest.raises(FileNotFoundError, match=r"part-00001.parquet does not exist"):
        RowGroups(str(tmp_path)).read("train/part-00001.parquet", 0, COLUMNS)
