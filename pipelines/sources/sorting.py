"""Sort any number of entries: sorted runs on the local disk, merged on reading (external merge sort)."""

import hashlib
import heapq
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from pipelines.sources.entry import SPLITS, Entry, fields_of

RUN_ENTRIES = 2**18
_MAX_RUNS = 256
_Row = tuple[object, ...]


class SortedEntries:
    """Entries sorted by split, then by a hash of the name (one image per file) or by name (many images per file).

    Iterable any number of times until it is closed.
    """

    def __init__(self, entries: Iterable[Entry], run_entries: int = RUN_ENTRIES) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mae-listing-")
        self._runs: list[Path] = []
        self._num_made = 0
        self._rest: list[_Row] = []
        try:
            self._fill(entries, run_entries)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Entry]:
        with ExitStack() as stack:
            runs = [_read(stack, run) for run in self._runs]
            for _, _, *fields in heapq.merge(*runs, self._rest):
                yield Entry(*fields)  # pyright: ignore[reportArgumentType] -- the fields of an Entry, in order

    def close(self) -> None:
        """Free the disk space."""
        self._folder.cleanup()

    def _fill(self, entries: Iterable[Entry], run_entries: int) -> None:
        for entry in entries:
            self._rest.append((("", *SPLITS).index(entry.split), _mixed(entry), *fields_of(entry)))
            if len(self._rest) == run_entries:
                self._rest.sort()
                self._spill(self._rest)
                self._rest = []
                if len(self._runs) == _MAX_RUNS:
                    self._merge_runs()
        self._rest.sort()

    def _spill(self, rows: Iterable[_Row]) -> None:
        path = Path(self._folder.name, f"{self._num_made:06d}.jsonl")
        self._num_made += 1
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._runs.append(path)

    def _merge_runs(self) -> None:
        """Merge all runs into one, to limit the number of open files."""
        merged, self._runs = self._runs, []
        with ExitStack() as stack:
            self._spill(heapq.merge(*(_read(stack, run) for run in merged)))
        for run in merged:
            run.unlink()


def _mixed(entry: Entry) -> int:
    """Return a hash of the name, or 0 for an image within a larger file.

    Hashing mixes the classes, because folders hold one class each and a shuffle window of training only mixes what is
    stored close together. Images within a larger file keep their order, so that neighbours are read in one request.
    """
    if entry.offset >= 0 or entry.group >= 0:
        return 0
    name = entry.name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big")


def _read(stack: ExitStack, run: Path) -> Iterator[_Row]:
    return (tuple(json.loads(line)) for line in stack.enter_context(run.open()))
