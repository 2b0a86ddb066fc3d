"""Read Parquet files in small parts; turn Arrow's errors about damage into messages that name the file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.table_files import Content, content_of, is_damage
from pipelines.storage import Storage

_BATCH_ROWS = 16
_MAX_EMPTY_ROWS = 2**20


class ParquetTable:
    """A Parquet file."""

    def __init__(self, storage: Storage, path: str, file: pq.ParquetFile) -> None:
        self.schema, self.num_groups, self.passed_over = file.schema_arrow, file.num_row_groups, PassedOver()
        self._uri, self._file = storage.join(path), file
        self._num_bytes = storage.stat(path).num_bytes

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        metadata = self._file.metadata.row_group(group)
        columns = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
        image = columns.get(column)
        # A small file can claim billions of empty rows, each of which would become an entry.
        if image is None or metadata.num_rows > max(_MAX_EMPTY_ROWS, self._num_bytes):
            raise UserError(f"{self._uri} is damaged (row group {group}); copy it again")
        stats = image.statistics if column.endswith(".bytes") else None
        if metadata.num_rows and stats and stats.has_null_count and stats.null_count == metadata.num_rows:
            raise UserError(
                f"column {column} of {self._uri} is empty: the file names its images instead of holding them; give a "
                "list of their paths, or write the file with the images (datasets: embed_table_storage)"
            )
        return range(metadata.num_rows), image.total_uncompressed_size // max(1, metadata.num_rows)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self._file.read_row_group(group, columns=list(columns))

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)
        done, first = 0, 0
        for batch in batches:
            values = batch.column(0)
            values = values.field(0) if pat.is_struct(values.type) else values
            while done < len(rows) and rows[done] < first + len(values):
                yield content_of(values[rows[done] - first].as_py())
                done += 1
            if done == len(rows):
                return
            first += len(batch)
        raise UserError(f"{self._uri} ends before row {rows[done]} of row group {group}; copy it again")


@contextmanager
def open_rows(storage: Storage, path: str, version: str) -> Iterator[ParquetTable]:
    """Open the file as one of rows."""
    with open_table(storage, path) as file:
        yield ParquetTable(storage, path, file)


@contextmanager
def open_table(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """Open the file. Raises UserError, here or in the block, if it is not Parquet, damaged or truncated."""
    try:
        with (
            storage.open_input(path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20) as file,
        ):
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        reason = str(error).splitlines()[0].strip().rstrip(":")
        raise UserError(f"{storage.join(path)} is not an intact Parquet file ({reason}); copy it again") from None
