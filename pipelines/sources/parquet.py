"""Parquet files, read in small parts; what Arrow says of a damaged one becomes a sentence that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from pipelines.storage import Storage


@contextmanager
def open_table(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """The file. Raises UserError where it turns out, here or in the block, to be none, damaged or cut short."""
    try:
        with (
            storage.open_input(path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20) as file,
        ):
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not _is_damage(error):
            raise
        reason = str(error).splitlines()[0].strip().rstrip(":")
        raise UserError(f"{storage.join(path)} is not a whole Parquet file ({reason}); copy it again") from None


def _is_damage(error: Exception) -> bool:
    """Arrow raises OSError for Parquet that it cannot parse, too: one without a number, and of no store."""
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        return type(error) is OSError and error.errno is None and "AWS Error" not in str(error)
    return True
