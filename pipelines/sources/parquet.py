"""Read Parquet files in small parts; turn Arrow's errors about damage into messages that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from pipelines.storage import Storage


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
        if not _is_damage(error):
            raise
        reason = str(error).splitlines()[0].strip().rstrip(":")
        raise UserError(f"{storage.join(path)} is not an intact Parquet file ({reason}); copy it again") from None


def _is_damage(error: Exception) -> bool:
    """Return whether the error means damaged Parquet.

    Arrow also raises OSError for Parquet that it cannot parse: then it has no errno and does not come from a store.
    """
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        return type(error) is OSError and error.errno is None and "AWS Error" not in str(error)
    return True
