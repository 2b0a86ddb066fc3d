"""Rank 0's metrics, and evaluations while pretraining, as objects in the run folder: how they are written and read.

`pipelines.runs.followers` delivers them to MLflow from the driver, so that workers depend on the storage alone.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from mae_core.errors import UserError
from pipelines.registry.points import Point
from pipelines.storage import Storage

log = logging.getLogger(__name__)

_OBJECT_BYTES = 65536
_FLUSH_EVERY_S = 5.0


class MetricSpool:
    """Write rank 0's points as JSON lines to objects under `prefix`, each named by its first step.

    The newest object is rewritten with more lines until it is full, so that a long run leaves few objects. A restarted
    rank repeats steps, and its objects replace or overlap older ones; the follower delivers each step once.
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
        """Queue the values of a step for the writing thread; return at once even if the storage does not respond."""
        line = _line(step, values)
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
        """Write every queued point. Call it before committing a checkpoint, whose earlier steps are never repeated."""
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
        """End the thread and write every queued point."""
        self._closed.set()
        if self._writer is not None:
            self._writer.join()
        self.flush()

    def _keep_writing(self) -> None:
        while not self._closed.wait(_FLUSH_EVERY_S):
            try:
                self.flush()
            except OSError as error:
                log.warning("metrics could not be written, retrying in %g s: %s", _FLUSH_EVERY_S, error)


class Evaluations:
    """The evaluations of an encoder while it is pretrained: one object per step in evaluations/, never replaced."""

    PREFIX = "evaluations"

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Write the values of a step; return False, and change nothing, if it has some already."""
        return self._storage.write_new(self._path(step), _line(step, values))

    def steps(self) -> list[int]:
        """Return the steps that have been evaluated, ascending."""
        return [int(path[-18:-6]) for path, _ in self._storage.list(self.PREFIX, suffix=".jsonl")]

    def read(self, step: int) -> dict[str, float]:
        """Return the values of a step that has been evaluated."""
        path = self._path(step)
        return {point.key: point.value for point in read_points(self._storage.read(path), path)}

    def _path(self, step: int) -> str:
        return f"{self.PREFIX}/{step:012d}.jsonl"


def _line(step: int, values: Mapping[str, float]) -> bytes:
    point = {"step": step, "time_ms": int(time.time() * 1000), "values": {k: float(v) for k, v in values.items()}}
    return json.dumps(point).encode() + b"\n"


def read_points(content: bytes, path: str) -> Iterator[Point]:
    """Yield the points of one object, in order. Raises UserError that names the object and line if it is damaged."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            for key, value in entry["values"].items():
                yield Point(key, float(value), int(entry["step"]), int(entry["time_ms"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"metrics object {path} is damaged at line {number}; delete it and rerun") from None
