"""Metrics from rank 0 to whoever wants them: a spool in the run folder, and the driver that follows it."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pipelines.registry.points import Point
from pipelines.storage import Storage

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

_OBJECT_BYTES = 65536
_FLUSH_EVERY_S = 5.0
_POLL_EVERY_S = 2.0
_MAX_WAITING = 50_000
_LINE_EVERY_S = 30.0
_SHOWN = {"train/loss": "loss {:.4f}", "lr": "lr {:.2e}", "images_per_s": "{:,.0f} images/s"}


class MetricSpool:
    """Rank 0's points as JSON lines under `prefix`; each object is named by its first step.

    The newest object is written again, longer, until it is full, so that a long run leaves few of them. A restarted
    rank overwrites or overlaps what the steps that it repeats had left; the follower takes each step once.
    """

    def __init__(self, storage: Storage, prefix: str = "metrics") -> None:
        self._storage = storage
        self._prefix = prefix
        self._full: list[tuple[str, bytes]] = []
        self._name = ""
        self._lines: list[bytes] = []
        self._num_written = 0
        self._buffers = threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._writer: threading.Thread | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The values will be in the storage within seconds; returns at once, whatever the storage does."""
        point = {"step": step, "time_ms": int(time.time() * 1000), "values": {k: float(v) for k, v in values.items()}}
        line = json.dumps(point).encode() + b"\n"
        name = f"{self._prefix}/{step:012d}.jsonl"
        with self._buffers:
            if self._lines and sum(map(len, self._lines)) + len(line) > _OBJECT_BYTES and name != self._name:
                self._full.append((self._name, b"".join(self._lines)))
                self._lines, self._num_written = [], 0
            if not self._lines:
                self._name = name
            self._lines.append(line)
        if self._writer is None:
            self._writer = threading.Thread(target=self._keep_writing, name="metric-spool", daemon=True)
            self._writer.start()

    def flush(self) -> None:
        """Every point is in the storage. Call it before a checkpoint is committed: its steps are never repeated."""
        with self._writing:
            with self._buffers:
                full, name, lines = list(self._full), self._name, list(self._lines)
                is_new = self._num_written < len(lines)
            for full_name, content in full:
                self._storage.write(full_name, content)
            if is_new:
                self._storage.write(name, b"".join(lines))
            with self._buffers:
                del self._full[: len(full)]
                if self._name == name:
                    self._num_written = len(lines)

    def close(self) -> None:
        """Every point is in the storage and the thread has ended."""
        self._closed.set()
        if self._writer is not None:
            self._writer.join()
        self.flush()

    def _keep_writing(self) -> None:
        while not self._closed.wait(_FLUSH_EVERY_S):
            try:
                self.flush()
            except OSError as error:
                log.warning("metrics wait for the storage: %s", error)


class Sink(Protocol):
    """What points are delivered to; a run of MLflow is one."""

    @property
    def num_waiting(self) -> int:
        """Points taken but not yet stored."""
        ...

    def last_steps(self) -> dict[str, int]:
        """The last stored step of every metric."""
        ...

    def log_points(self, points: Sequence[Point]) -> None:
        """The points will be stored, in this order."""
        ...


class MetricFollower:
    """A thread of the driver that delivers each (metric, step) of a spool to a sink once and in order.

    Where a driver before it stopped is asked of the sink, so there is no position that could disagree with it.
    """

    def __init__(
        self,
        storage: Storage,
        sink: Sink,
        *,
        prefix: str = "metrics",
        display: "ProgressDisplay | None" = None,
        poll_every_s: float = _POLL_EVERY_S,
    ) -> None:
        self._storage, self._sink, self._prefix, self._display = storage, sink, prefix, display
        self._poll_every_s = poll_every_s
        self._last_steps = sink.last_steps()
        self._read_bytes: dict[str, int] = {}
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name="metric-follower", daemon=True)

    def __enter__(self) -> "MetricFollower":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Everything that was spooled is delivered. Raises what went wrong with that, unless more has gone wrong."""
        self._stop.set()
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            self.poll()
        except Exception as error:
            if failure[0] is None:
                raise
            log.warning("the last metrics were not delivered: %s", error)

    def poll(self) -> None:
        """What is new in the spool is delivered."""
        objects = self._storage.list(self._prefix, suffix=".jsonl")
        for i, (path, num_bytes) in enumerate(objects):
            # A rewritten object of equal size can only be the last: one that replaced others' steps is longer.
            if self._read_bytes.get(path) == num_bytes and i + 1 < len(objects):
                continue
            content = self._storage.read(path)
            self._deliver(read_points(content, path))
            self._read_bytes[path] = len(content)

    def _deliver(self, points: Iterable[Point]) -> None:
        new = []
        for point in points:
            if point.step > self._last_steps.get(point.key, -1):
                self._last_steps[point.key] = point.step
                new.append(point)
        if new:
            self._sink.log_points(new)
            if self._display is not None:
                self._display.show(new)

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_every_s):
            if self._sink.num_waiting > _MAX_WAITING:
                continue  # an outage: points are safe where they are
            try:
                self.poll()
            except OSError as error:
                log.warning("metrics wait for the storage: %s", error)
            except Exception as error:
                self._error = error
                log.warning("metrics are no longer followed: %s", error)
                return


def read_points(content: bytes, path: str) -> Iterator[Point]:
    """The points of one spooled object, in order. Raises ValueError that names the object and line if it is damaged."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            for key, value in entry["values"].items():
                yield Point(key, float(value), int(entry["step"]), int(entry["time_ms"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"metrics object {path} is damaged at line {number}; delete it and run again") from None


class ProgressDisplay:
    """Loss, lr, images/s and the time left, on stderr: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, title: str, total_steps: int) -> None:
        self._title, self._total = title, total_steps
        self._values: dict[str, float] = {}
        self._first: Point | None = None
        self._line_due_s = 0.0
        self._bar = _bar(title, total_steps) if sys.stderr.isatty() else None

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, points: Sequence[Point]) -> None:
        """The display is that of the newest point."""
        newest = points[-1]
        self._first = self._first or points[0]
        self._values.update((point.key, point.value) for point in points)
        text = self._text(newest)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=newest.step, text=text)
        elif time.monotonic() >= self._line_due_s or newest.step >= self._total:
            log.info("%s: step %d of %d, %s", self._title, newest.step, self._total, text)
            self._line_due_s = time.monotonic() + _LINE_EVERY_S

    def _text(self, newest: Point) -> str:
        values = self._values
        parts = [text.format(values[key]) for key, text in _SHOWN.items() if key in values]
        assert self._first is not None
        steps, seconds = newest.step - self._first.step, (newest.time_ms - self._first.time_ms) / 1000
        if steps > 0 and newest.step < self._total:
            left_s = round(seconds / steps * (self._total - newest.step))
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d} left")
        return ", ".join(parts)


def _bar(title: str, total_steps: int) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(title, total=total_steps, text="")
    return bar
