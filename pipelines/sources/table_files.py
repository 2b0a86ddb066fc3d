"""Files of rows: what a source needs of each, whichever library reads it. `open_rows` opens them.

A file has groups of rows, which are read together: row groups of Parquet, fragments of Lance, shards of MDS. Columns
have Arrow types, so that labels, splits and groups follow the same rules everywhere.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.sources.passed_over import PassedOver
from pipelines.storage import Storage
from pipelines.storage.listing import check_size

MAX_IMAGE_BYTES = 256 * 2**20
Content = bytes | ValueError
"""The bytes of an image, or the reason why it cannot be read."""


class TableFile(Protocol):
    """An open file of rows."""

    schema: pa.Schema
    num_groups: int
    passed_over: PassedOver
    """Rows that are no images by their content, where a format has such."""

    def rows(self, group: int, column: str) -> tuple[Sequence[int], int]:
        """Return the position of each row, ascending, and the mean number of bytes of its image."""
        ...

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return columns other than the image's, all rows of a group."""
        ...

    def contents(self, group: int, rows: Sequence[int], column: str) -> Iterator[Content]:
        """Yield the images at these positions, a few at a time in memory."""
        ...


def content_of(value: bytes | None) -> Content:
    """Return the bytes of a cell, or why they are no image."""
    if value is None:
        return ValueError("empty row")
    try:
        check_size(len(value), MAX_IMAGE_BYTES)
    except ValueError as error:
        return error
    return value


def folder_of(storage: Storage, path: str, what: str) -> str:
    """Return the path on this machine. Raises UserError if the storage is a bucket, which the library cannot read."""
    if not storage.is_local:
        raise UserError(f"{storage.join(path)}: {what} are read from a folder of this machine; copy them to one")
    return storage.join(path)


def missing(uri: str, what: str, library: str, install: str = "'.[tables]'") -> UserError:
    """Return the error for a library that is not installed."""
    return UserError(f"{uri} is {what}, which needs {library}; pip install {install}")


def damaged(uri: str, what: str, error: Exception | str) -> UserError:
    """Return the error for a file that its library cannot read, which may raise anything."""
    reason = str(error).partition("\n")[0].strip().rstrip(".:") or type(error).__name__
    return UserError(f"{uri} is not an intact {what} ({reason[:200]}); copy it again")


def is_damage(error: Exception) -> bool:
    """Return whether the error means a damaged file.

    Arrow also raises OSError for a file that it cannot parse: then it has no errno and does not come from a store.
    """
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        return type(error) is OSError and error.errno is None and "AWS Error" not in str(error)
    return True
