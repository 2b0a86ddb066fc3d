"""Images that could not be read, with the reason for each, as a prepared (or unfinished) dataset keeps them."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from pipelines.storage import Storage

FOLDER = "quarantine"


def quarantined(storage: Storage) -> Iterator[dict[str, Any]]:
    """Rows of the quarantine, in the order of the listing: source, reason, num_bytes and the file's first bytes."""
    for path, _ in storage.list(FOLDER, suffix=".parquet"):
        with storage.open_input(path) as source:
            yield from pq.read_table(source).to_pylist()
