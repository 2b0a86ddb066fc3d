"""Checkpoints are written by a thread of rank 0 while training goes on."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from mae_core.state import parts
from pipelines.runs.checkpoints import CheckpointStore, Retention
from pipelines.storage.retries import retry_limit

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 15.0

# Tensors by file and name.
Tensors = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """Commits one snapshot at a time. What goes wrong is raised by the next call of `save` or `wait`."""

    def __init__(
        self, store: CheckpointStore, retention: Retention, *, patience_s: float, before: Callable[[], None]
    ) -> None:
        """`before` is called before each commit, on the writer's thread."""
        self._store, self._retention, self._patience_s, self._before = store, retention, patience_s, before
        self._todo: SimpleQueue[tuple[int, Tensors, dict[str, Any]] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        # Made once, while there is memory: a thread that has none for its first steps never says that it has started.
        threading.Thread(target=self._serve, name="checkpoints", daemon=True).start()

    def save(self, step: int, take: Callable[[], Tensors], meta: dict[str, Any]) -> None:
        """The snapshot that `take` returns now will be committed; the one before it has been.

        One snapshot at a time is held in memory, so this waits for the one before. Raises what kept that from being
        committed.
        """
        self.wait()
        snapshot = {f"{name}.safetensors": tensors for name, tensors in take().items()}
        self._idle.clear()
        self._todo.put((step, snapshot, meta))

    def wait(self) -> None:
        """Every snapshot that was saved is committed. Raises what kept the last one from it."""
        self._idle.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Every snapshot that was saved is committed, and the thread ends. Raises what kept the last one from it."""
        self._todo.put(None)
        self.wait()

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """The next snapshot is committed, and held no longer; False where there will be none."""
        todo = self._todo.get()
        if todo is None:
            return False
        try:
            self._commit(*todo)
        except BaseException as error:
            self._error = error
        self._idle.set()
        return True

    def _commit(self, step: int, snapshot: Tensors, meta: dict[str, Any]) -> None:
        """Tries again through an outage of up to `patience_s`. Raises OSError, which says so, after that."""
        deadline_s, pause_s = time.monotonic() + self._patience_s, 0.5
        files = {name: parts(tensors) for name, tensors in snapshot.items()}
        while True:
            try:
                # The storage asks again by itself; not for longer than is left of our own patience.
                with retry_limit(max(0.0, deadline_s - time.monotonic())):
                    self._before()
                    self._store.commit(step, files, meta, self._retention)
                return
            except OSError as error:
                if time.monotonic() + pause_s > deadline_s:
                    raise OSError(
                        f"the checkpoint of step {step} could not be written within {self._patience_s:g} s ({error}); "
                        "make room or mend the storage, and run the same command again"
                    ) from error
                log.warning("checkpoint of step %d is tried again in %.1f s: %s", step, pause_s, error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
