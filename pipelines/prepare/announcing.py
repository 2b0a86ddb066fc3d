"""Prepare slices in the order in which a first epoch reads them, and announce each once nothing will change it.

1. Slices of test come first, then those of val, then those of train, each in listing order.
2. A slice is final once it is written and all before it are: of equal images the one in the first of these splits, and
   there the earliest, is kept, so that only slices before it decide what it loses.
3. A slice that has duplicates is written again without them at once, and not after the first pass.

The result is the same to the byte as that of two passes. The price: 16 bytes of memory for every image, and no slice is
cut into pieces.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, SliceSummary
from pipelines.prepare.tasks import unwrapped
from pipelines.prepare.workfolder import WorkFolder

_POLL_EVERY_S = 0.2
_RANKS = {"test": 0, "val": 1}
"""Order of the folders of slices; all others come last."""

# (summary of a slice that is final, number of slices that are, number of all) -> None
Announce: TypeAlias = Callable[[SliceSummary, int, int], None]


class Stopped(Exception):
    """The preparation was asked to stop; another one of the same source and config continues it."""


@dataclass(frozen=True, kw_only=True)
class SlicePlace:
    """What is known of a slice before it is prepared."""

    num_entries: int
    folder: str
    holds_out: bool


def first_epoch_order(parts: Sequence[SlicePlace]) -> list[int]:
    """Return the numbers of all slices in the order in which they are announced."""
    return sorted(range(len(parts)), key=lambda number: (_RANKS.get(parts[number].folder, len(_RANKS)), number))


class TaskPool(Protocol):
    """Runs the tasks of a preparation beside each other."""

    @property
    def is_full(self) -> bool:
        """Whether as many tasks run as may at a time."""
        ...

    def start(self, name: str, row: dict[str, Any]) -> None:
        """Start the task `name` of `SliceTasks` for this row."""
        ...

    def finished(self, timeout_s: float) -> list[tuple[str, dict[str, int]]]:
        """Return name and counts of the tasks that have ended, after at most this time. Raises a task's error."""
        ...


class RayTaskPool:
    """Ray tasks, which request `num_cpus` each, at most `limit` at a time."""

    def __init__(self, tasks: object, limit: int, num_cpus: float) -> None:
        import ray

        self._call: Any = ray.remote(num_cpus=num_cpus)(_call)
        self._tasks, self._limit = ray.put(tasks), limit
        self._running: dict[Any, str] = {}

    @property
    def is_full(self) -> bool:
        return len(self._running) >= self._limit

    def start(self, name: str, row: dict[str, Any]) -> None:
        self._running[self._call.remote(self._tasks, name, row)] = name

    def finished(self, timeout_s: float) -> list[tuple[str, dict[str, int]]]:
        import ray
        from ray.exceptions import RayError

        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        try:
            return [(self._running.pop(ref), ray.get(ref)) for ref in ready]
        except RayError as error:
            raise unwrapped(error) from error


def _call(tasks: object, name: str, row: dict[str, Any]) -> dict[str, int]:
    return getattr(tasks, name)(row)


class WritingInOrder:
    """Writes all slices, in `order` as far as tasks end in order, and announces them in `order`."""

    def __init__(
        self,
        order: Sequence[int],
        work: WorkFolder,
        drops_duplicates: bool,
        pool: TaskPool,
        count_bad: Callable[[int], None],
    ) -> None:
        self._order, self._work, self._pool, self._count_bad = order, work, pool, count_bad
        self._seen = SeenDigests() if drops_duplicates else None
        self._written, self._dropped = work.done(), work.done(again=True)
        self._todo = deque(number for number in order if number not in self._written)
        self._to_drop: deque[int] = deque()
        self._num_examined = self._num_announced = 0
        self.skipped: dict[int, list[int]] = {}
        """Positions of the duplicates by slice, as far as slices are examined."""

    def run(self, announce: Announce, is_stopped: Callable[[], bool]) -> None:
        """Write and announce every slice. Raises Stopped soon after `is_stopped` returns True."""
        while True:
            self._examine()
            self._announce(announce)
            if self._num_announced == len(self._order):
                return
            if is_stopped():
                raise Stopped
            self._start()
            for name, counts in self._pool.finished(_POLL_EVERY_S):
                self._count_bad(counts["num_bad"])
                (self._dropped if name == "drop" else self._written).add(counts["number"])

    def _examine(self) -> None:
        """Find the duplicates of every slice that is written, if all before it are."""
        while self._num_examined < len(self._order) and self._order[self._num_examined] in self._written:
            number = self._order[self._num_examined]
            self._num_examined += 1
            skip = [] if self._seen is None else self._seen.add(self._work.summary(number))
            if skip:
                self.skipped[number] = skip
                if number not in self._dropped:
                    self._work.begin_second_pass()
                    self._to_drop.append(number)

    def _announce(self, announce: Announce) -> None:
        while self._num_announced < self._num_examined:
            number = self._order[self._num_announced]
            if number in self.skipped and number not in self._dropped:
                return
            self._num_announced += 1
            summary = self._work.summary(number, again=number in self.skipped)
            announce(summary, self._num_announced, len(self._order))

    def _start(self) -> None:
        while self._to_drop and not self._pool.is_full:
            number = self._to_drop.popleft()
            self._pool.start("drop", {"number": number, "skip": self.skipped[number]})
        while self._todo and not self._pool.is_full:
            self._pool.start("write", {"number": self._todo.popleft(), "start": 0, "stop": 0})


class SeenDigests:
    """Digests of the images of slices, in sorted arrays whose sizes at least double, as in a log-structured merge."""

    def __init__(self) -> None:
        self._levels: list[NDArray[np.uint64]] = []

    def add(self, summary: SliceSummary) -> list[int]:
        """Add the readable images of a slice; return the positions of those that were there, or come twice in it."""
        digests = np.frombuffer(bytes(summary.digests), dtype=f"V{DIGEST_BYTES}").view(">u8").reshape(-1, 2)
        readable = np.flatnonzero(np.frombuffer(bytes(summary.splits), dtype=np.uint8) != NO_SPLIT)
        mine = digests[readable].astype(np.uint64)
        is_seen, first = self._contains(mine), set[tuple[int, int]]()
        for i, digest in enumerate(map(tuple, mine.tolist())):
            is_seen[i] |= digest in first
            first.add(digest)
        self._insert(mine[~is_seen])
        return readable[is_seen].tolist()

    def _contains(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = np.zeros(len(digests), dtype=bool)
        for level in self._levels:
            starts, stops = (np.searchsorted(level[:, 0], digests[:, 0], side) for side in ("left", "right"))
            for i in np.flatnonzero(stops > starts).tolist():
                found[i] |= bool((level[starts[i] : stops[i], 1] == digests[i, 1]).any())
        return found

    def _insert(self, digests: NDArray[np.uint64]) -> None:
        self._levels.append(digests[np.argsort(digests[:, 0], kind="stable")])
        while len(self._levels) > 1 and len(self._levels[-2]) <= 2 * len(self._levels[-1]):
            merged = np.concatenate([self._levels.pop(), self._levels.pop()])
            self._levels.append(merged[np.argsort(merged[:, 0], kind="stable")])


def num_trained_on(parts: Sequence[SlicePlace], val_fraction: float) -> tuple[int, int]:
    """Return the most images that split train may have, and the number to expect if none is bad or a duplicate."""
    trained = [part for part in parts if part.folder in ("", "train")]
    expected = sum(part.num_entries * (1 - val_fraction if part.holds_out else 1.0) for part in trained)
    return sum(part.num_entries for part in trained), max(1, round(expected))
