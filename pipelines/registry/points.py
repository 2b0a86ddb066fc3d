"""Send metric points to MLflow in the background: an outage delays points but neither loses nor duplicates any."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mae_core.errors import UserError
from pipelines.registry.outages import TrackingUnreachable, first_line, is_outage

log = logging.getLogger(__name__)

POINTS_PER_REQUEST = 1000
"""MLflow's limit for one `log_batch` request."""
_LONGEST_PAUSE_S = 15.0


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int


class PointSender:
    """A queue of points that a thread sends in order.

    A batch leaves the queue only after MLflow confirmed it. If MLflow stored a batch but its response was lost, the
    batch is sent again. That is harmless: MLflow keeps one row per equal (key, timestamp, step, value).
    """

    def __init__(self, send: Callable[[list[Point]], None]) -> None:
        self._send = send
        self._queue: deque[Point] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._closed = False

    @property
    def num_waiting(self) -> int:
        """Number of points that MLflow has not confirmed."""
        return len(self._queue)

    def add(self, points: Sequence[Point]) -> None:
        """Queue the points and return at once. Raises the error with which MLflow refused an earlier point."""
        with self._changed:
            self._raise_refusal()
            self._queue.extend(points)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlflow-points", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, limit_s: float) -> None:
        """Wait until MLflow has every point. Raises TrackingUnreachable if that takes longer than `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        with self._changed:
            self._changed.notify_all()
            while self._queue and not self._error:
                if not self._changed.wait(max(0.0, deadline_s - time.monotonic())) and time.monotonic() >= deadline_s:
                    raise TrackingUnreachable(
                        f"MLflow did not respond for {limit_s:g} s and {len(self._queue)} metric points are waiting; "
                        "start it and rerun the same command: the run folder still has them"
                    )
            self._raise_refusal()

    def close(self) -> None:
        """Stop the thread and drop the points that are still waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=_LONGEST_PAUSE_S)

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                if pause_s:
                    self._changed.wait(pause_s)
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                batch = [self._queue[i] for i in range(min(len(self._queue), POINTS_PER_REQUEST))]
            try:
                self._send(batch)
            except Exception as error:
                if not is_outage(error):
                    self._refuse(error)
                    return
                if not pause_s:
                    log.warning("MLflow does not respond; metric points are waiting: %s", first_line(error))
                pause_s = min(2 * pause_s or 0.5, _LONGEST_PAUSE_S)
                continue
            if pause_s:
                log.warning("MLflow responds again; sending %d metric points", len(self._queue))
            pause_s = 0.0
            with self._changed:
                for _ in batch:
                    self._queue.popleft()
                self._changed.notify_all()

    def _refuse(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _raise_refusal(self) -> None:
        if self._error is not None:
            raise UserError(f"MLflow refused metric points: {first_line(self._error)}") from self._error
