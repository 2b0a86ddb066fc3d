"""The thread of a driver that prepares a dataset while a worker group trains its first epoch."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from mae_core.errors import UserError
from pipelines.dataset.manifest import Manifest
from pipelines.feed.listing import Announcements
from pipelines.prepare.announcing import Stopped
from pipelines.prepare.summaries import SliceSummary
from pipelines.stages import SAY_EVERY_S

log = logging.getLogger(__name__)

_STOP_S = 10.0
"""Time for the thread that prepares to notice that it is to stop."""


class Preparing:
    """A thread that prepares the dataset and announces its training shards, and what came of it."""

    def __init__(
        self, work: Callable[["Preparing"], Manifest], failed: Callable[[], None], announcements: Announcements
    ) -> None:
        self._work, self._failed, self._announcements = work, failed, announcements
        self._first: SliceSummary | None = None
        self._num_shards = 0
        self._manifest: Manifest | None = None
        self._error: BaseException | None = None
        self._has_begun, self._has_ended, self._stop = threading.Event(), threading.Event(), threading.Event()
        self.done = (0, 0)
        """Number of slices that are final, and of all."""
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)

    def __enter__(self) -> "Preparing":
        self._thread.start()
        threading.Thread(target=self._say, name="preparing-says", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._has_ended.wait(_STOP_S)

    def first(self) -> SliceSummary:
        """Wait for the first slice with training images; return its summary. Raises the error of the preparation."""
        self._has_begun.wait()
        if self._first is None:
            self.manifest()
            raise UserError("no image is left to train on; put images in train/, or try a lower --prepare.val-fraction")
        return self._first

    def manifest(self) -> Manifest:
        """Wait for the end of the preparation; return the dataset's manifest. Raises its error."""
        self._has_ended.wait()
        if self._error is not None:
            raise self._error
        assert self._manifest is not None
        return self._manifest

    def announce(self, summary: SliceSummary, num_done: int, num_slices: int) -> None:
        """Announce the training shard of a slice that is final, if it has one."""
        self.done = num_done, num_slices
        for shard in summary.shards:
            if shard.split == "train":
                self._announcements.add(self._num_shards, shard.path, shard.num_rows)
                self._num_shards += 1
                self._first = self._first or summary
                self._has_begun.set()
        if num_done == num_slices:
            self._announcements.complete(self._num_shards)

    def is_stopped(self) -> bool:
        """Return whether the thread is to stop."""
        return self._stop.is_set()

    def _run(self) -> None:
        try:
            self._manifest = self._work(self)
        except BaseException as error:
            self._error = error
            if not isinstance(error, Stopped) and not self._stop.is_set():
                # Without Ray there are no workers to stop.
                with suppress(Exception):
                    self._failed()
        finally:
            self._has_ended.set()
            self._has_begun.set()

    def _say(self) -> None:
        while not self._has_ended.wait(SAY_EVERY_S) and not self._stop.is_set():
            if self.done[1]:
                log.info("preparing, %d of %d slices", *self.done)
