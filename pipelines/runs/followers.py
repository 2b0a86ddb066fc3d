"""Threads of the driver that deliver what workers leave in the run folder to MLflow, while the run is under way."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol, Self

from pipelines.registry.points import Point
from pipelines.runs.metrics import Evaluations, read_points
from pipelines.storage import Storage

if TYPE_CHECKING:
    from pipelines.runs.progress import ProgressDisplay

log = logging.getLogger(__name__)

_POLL_EVERY_S = 2.0
_MAX_WAITING = 50_000


class Follower(ABC):
    """Call `poll` periodically on a thread while a block runs, and once more when it ends.

    An error in `retried` is logged, and the next poll tries again. Any other error ends the thread and is raised when
    the block ends, unless the block itself failed.
    """

    what: str
    """What is delivered, for log messages."""
    retried: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, storage: Storage, prefix: str, poll_every_s: float) -> None:
        self._storage, self._prefix, self._poll_every_s = storage, prefix, poll_every_s
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name=f"{self.what}-follower", daemon=True)

    @abstractmethod
    def poll(self) -> None:
        """Deliver everything that is new in the storage."""

    def is_ready(self) -> bool:
        """Return whether the receiver can take more now; the last poll does not ask."""
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            self.poll()
        except Exception as error:
            if failure[0] is None:
                raise
            log.warning("the last %s were not delivered: %s", self.what, error)

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_every_s):
            if not self.is_ready():
                continue
            try:
                self.poll()
            except self.retried as error:
                log.warning("%s could not be delivered, retrying in %g s: %s", self.what, self._poll_every_s, error)
            except Exception as error:
                self._error = error
                log.warning("%s are no longer delivered: %s", self.what, error)
                return


class MetricSink(Protocol):
    """Receiver of points; an MLflow run is one."""

    @property
    def num_waiting(self) -> int:
        """Number of points that were taken but are not yet stored."""
        ...

    def last_steps(self) -> dict[str, int]:
        """Return the last stored step of every metric."""
        ...

    def log_points(self, points: Sequence[Point]) -> None:
        """Queue the points, to be stored in this order."""
        ...


class MetricFollower(Follower):
    """Deliver each (metric, step) of a spool to a sink exactly once and in order.

    The sink tells where a previous driver stopped, so that no stored position can disagree with it.
    """

    what = "metrics"

    def __init__(
        self,
        storage: Storage,
        sink: MetricSink,
        *,
        prefix: str = "metrics",
        display: "ProgressDisplay | None" = None,
        poll_every_s: float = _POLL_EVERY_S,
    ) -> None:
        super().__init__(storage, prefix, poll_every_s)
        self._sink, self._display = sink, display
        self._last_steps = sink.last_steps()
        self._read_bytes: dict[str, int] = {}

    def poll(self) -> None:
        objects = self._storage.list(self._prefix, suffix=".jsonl")
        for i, (path, num_bytes) in enumerate(objects):
            # A rewritten object of equal size can only be the last: one that replaced others' steps is longer.
            if self._read_bytes.get(path) == num_bytes and i + 1 < len(objects):
                continue
            content = self._storage.read(path)
            self._deliver(read_points(content, path))
            self._read_bytes[path] = len(content)

    def is_ready(self) -> bool:
        """Return whether the sink's queue is short; during an outage of MLflow the points stay in the storage."""
        return self._sink.num_waiting <= _MAX_WAITING

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


class EvaluationFollower(MetricFollower):
    """Deliver the evaluations of an encoder while it is pretrained, which are few and may come late."""

    what = "evaluations"

    def __init__(self, storage: Storage, sink: MetricSink) -> None:
        super().__init__(storage, sink, prefix=Evaluations.PREFIX, poll_every_s=5 * _POLL_EVERY_S)


class PictureSink(Protocol):
    """Receiver of pictures; an MLflow run is one."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store the file in that folder."""
        ...


class PictureFollower(Follower):
    """Deliver the workers' pictures as they are drawn, and all of them by the end.

    A picture can wait: any error is retried, and only the last poll raises it.
    """

    what = "pictures"
    retried = (Exception,)

    def __init__(
        self, storage: Storage, sink: PictureSink, *, prefix: str = "pictures", poll_every_s: float = 5 * _POLL_EVERY_S
    ) -> None:
        super().__init__(storage, prefix, poll_every_s)
        self._sink = sink
        self._delivered: set[str] = set()

    def poll(self) -> None:
        # Delivering a picture twice replaces it by itself.
        for path, _ in self._storage.list(self._prefix, suffix=".png"):
            if path not in self._delivered:
                with TemporaryDirectory(prefix="mae-picture-") as scratch:
                    local = Path(scratch) / Path(path).name
                    local.write_bytes(self._storage.read(path))
                    self._sink.log_file(local, self._prefix)
                self._delivered.add(path)
