"""Read the quarantine of a prepared or unfinished dataset: unreadable images, each with its reason."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from pipelines.storage import Storage

FOLDER = "quarantine"


def quarantined(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the quarantine's rows in listing order: source, reason, num_bytes and the file's first bytes."""
    for path, _ in storage.list(FOLDER, suffix=".parquet"):
        with storage.open_input(path) as source:
            yield from pq.read_table(source).to_pylist()
