"""Write checkpoints on a thread of rank 0, while training continues."""

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

# Tensors by file, then by name.
Tensors = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """Commit one snapshot at a time on a thread. The next call of `save`, `wait` or `close` raises its error."""

    def __init__(
        self, store: CheckpointStore, retention: Retention, *, patience_s: float, before: Callable[[], None]
    ) -> None:
        """Start the thread. It calls `before` before each commit and retries a failed one for `patience_s` seconds."""
        self._store, self._retention, self._patience_s, self._before = store, retention, patience_s, before
        self._todo: SimpleQueue[tuple[int, Tensors, dict[str, Any]] | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        # Started early, while memory is free: Thread.start() hangs if the new thread runs out of memory at once.
        threading.Thread(target=self._serve, name="checkpoints", daemon=True).start()

    def save(self, step: int, take: Callable[[], Tensors], meta: dict[str, Any]) -> None:
        """Wait for the previous commit, then call `take` for a snapshot and queue it for the thread.

        Only one snapshot is in memory at a time. Raises the error of the previous commit, if it failed.
        """
        self.wait()
        snapshot = {f"{name}.safetensors": tensors for name, tensors in take().items()}
        self._idle.clear()
        self._todo.put((step, snapshot, meta))

    def wait(self) -> None:
        """Wait until the last saved snapshot is committed. Raises the error of that commit, if it failed."""
        self._idle.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait like `wait`, and end the thread."""
        self._todo.put(None)
        self.wait()

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Commit the next snapshot and release its memory; return False after `close`."""
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
        """Commit a snapshot, retrying for up to `patience_s`. Raises OSError if it still fails then."""
        deadline_s, pause_s = time.monotonic() + self._patience_s, 0.5
        files = {name: parts(tensors) for name, tensors in snapshot.items()}
        while True:
            try:
                # The storage itself retries requests; limit that to what remains of `patience_s`.
                with retry_limit(max(0.0, deadline_s - time.monotonic())):
                    self._before()
                    self._store.commit(step, files, meta, self._retention)
                return
            except OSError as error:
                if time.monotonic() + pause_s > deadline_s:
                    raise OSError(
                        f"the checkpoint of step {step} could not be written within {self._patience_s:g} s ({error}); "
                        "make room or fix the storage, and rerun the same command"
                    ) from error
                log.warning("could not write the checkpoint of step %d, retrying in %.1f s: %s", step, pause_s, error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
