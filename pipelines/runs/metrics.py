"""Metrics from rank 0 to whoever wants them: a spool in the run folder, and the driver that follows it."""

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from mae_core.errors import UserError
from pipelines.registry.points import Point
from pipelines.storage import Storage

if TYPE_CHECKING:
    from pipelines.runs.progress import ProgressDisplay

log = logging.getLogger(__name__)

_OBJECT_BYTES = 65536
_FLUSH_EVERY_S = 5.0
_POLL_EVERY_S = 2.0
_MAX_WAITING = 50_000


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


class PictureSink(Protocol):
    """What pictures are delivered to; a run of MLflow is one."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """The file is stored in that folder."""
        ...


class PictureFollower:
    """A thread of the driver that delivers the workers' pictures as they are drawn; all of them by the end."""

    def __init__(
        self, storage: Storage, sink: PictureSink, *, prefix: str = "pictures", poll_every_s: float = 5 * _POLL_EVERY_S
    ) -> None:
        self._storage, self._sink, self._prefix, self._poll_every_s = storage, sink, prefix, poll_every_s
        self._delivered: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="picture-follower", daemon=True)

    def __enter__(self) -> "PictureFollower":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.poll()
        except Exception as error:
            if failure[0] is None:
                raise
            log.warning("the last pictures were not delivered: %s", error)

    def poll(self) -> None:
        """Every picture in the storage is delivered. Delivering one twice replaces it by itself."""
        for path, _ in self._storage.list(self._prefix, suffix=".png"):
            if path not in self._delivered:
                with TemporaryDirectory(prefix="mae-picture-") as scratch:
                    local = Path(scratch) / Path(path).name
                    local.write_bytes(self._storage.read(path))
                    self._sink.log_file(local, self._prefix)
                self._delivered.add(path)

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_every_s):
            try:
                self.poll()
            except Exception as error:  # a picture can wait; the end of the run delivers it or says why not
                log.warning("pictures wait: %s", error)


def read_points(content: bytes, path: str) -> Iterator[Point]:
    """The points of one spooled object, in order. Raises UserError that names the object and line if it is damaged."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            for key, value in entry["values"].items():
                yield Point(key, float(value), int(entry["step"]), int(entry["time_ms"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"metrics object {path} is damaged at line {number}; delete it and run again") from None
