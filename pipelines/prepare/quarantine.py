"""The quarantine of a prepared or unfinished dataset: unreadable images, each with its reason."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.errors import UserError
from pipelines.storage import Storage

FOLDER = "quarantine"
SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("head", pa.binary()),
    ]
)
"""`head` holds the file's first bytes, for diagnosis."""
MIN_BAD_TO_STOP = 100
"""With fewer bad images than this, all parts are read before max_bad is checked."""
_HEAD_BYTES = 2**16
# Limit on the total size of all heads in a quarantine file.
_HEADS_BYTES = 16 * 2**20
_NUM_SHOWN = 20


class Quarantine:
    """Unreadable images of one part, collected and then written to one file."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, int, bytes]] = []
        self._heads_bytes = _HEADS_BYTES

    def add(self, source: str, reason: str, content: bytes) -> None:
        """Add an image; `content` is what could be read of it."""
        self._add(source, reason, len(content), content)

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of the quarantine of a part of this one. The same rows result as if all had been added here."""
        for row in rows:
            self._add(row["source"], row["reason"], row["num_bytes"], row["head"])

    def _add(self, source: str, reason: str, num_bytes: int, start: bytes) -> None:
        head = start[: min(_HEAD_BYTES, self._heads_bytes)]
        self._heads_bytes -= len(head)
        self._rows.append((source, reason, num_bytes, head))

    @property
    def reasons(self) -> dict[str, int]:
        """Number of images by kind of reason."""
        return dict(sorted(Counter(reason.split(":")[0] for _, reason, *_ in self._rows).items()))

    def write(self, out: Storage, path: str) -> None:
        """Write the file, unless there is nothing to write."""
        if self._rows:
            columns = [pa.array(column, kind) for column, kind in zip(zip(*self._rows), SCHEMA.types)]
            with out.create(path) as file:
                pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), file)


def quarantined(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the quarantine's rows in listing order: source, reason, num_bytes and the file's first bytes."""
    for path, _ in storage.list(FOLDER, suffix=".parquet"):
        with storage.open_input(path) as source:
            yield from pq.read_table(source).to_pylist()


def refuse_bad(target: Storage, num_bad: int, num_found: int, max_bad: float) -> None:
    """Raise UserError, with the first bad images and their reasons, if more are bad than `max_bad` allows."""
    if num_bad <= max_bad * num_found:
        return
    shown = [f"{row['source']} ({row['reason']})" for row in islice(quarantined(target), _NUM_SHOWN)]
    more = f", and {num_bad - len(shown)} more in {target.join(FOLDER)}" if num_bad > _NUM_SHOWN else ""
    raise UserError(
        f"{num_bad} of {num_found} images are bad, more than max_bad {max_bad:g} allows: "
        f"{', '.join(shown)}{more}; fix or remove them, or rerun with a higher --max-bad"
    )
