"""Stop all ranks of a group after the same unit of work, at no cost to those that nobody stops.

A unit is what a rank does with one step of its feed. All ranks work through the same units in the same order, some of
which end in a collective, so all must do the same number of them.

1. A thread of each rank asks the shared table a few times a second whether the group is to stop.
2. If so, it holds its rank before the next unit and proposes the one that the rank is in. It can do so while the rank
   waits in a collective for another rank.
3. The thread of rank 0 settles on the latest unit proposed. No rank is beyond it, and none waits for a rank that will
   not reach it.
4. Every rank works up to that unit and raises StopRequested before the next one.

The price: ranks stand still for up to two intervals of polling, once they are to stop.
"""

import logging
import math
import threading
from types import TracebackType

from pipelines.runs.stopping import StopRequest

log = logging.getLogger(__name__)

_POLL_EVERY_S = 0.2


class StopRequested(Exception):
    """The driver asked the group to stop; every rank raises it before the same unit of work."""


class StopGate:
    """Count the units of work of a rank, and hold it where the ranks of its group agree to stop."""

    def __init__(
        self, request: StopRequest, group: str, index: int, world: int, *, poll_every_s: float = _POLL_EVERY_S
    ) -> None:
        """Prepare the gate of rank `index` of `world`. `group` names this start of the group in all of the cluster."""
        self._request, self._vote = request, request.vote(group)
        self._index, self._world, self._poll_every_s = index, world, poll_every_s
        self._changed = threading.Condition()
        self._num_entered = 0
        self._last_unit = math.inf
        """Unit that the rank may enter last."""
        self._is_agreed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-gate", daemon=True)

    def __enter__(self) -> "StopGate":
        if self._is_made():
            self._last_unit = 0  # Begin nothing: this group was started after the request.
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def is_held(self) -> bool:
        """Return whether the rank must ask before its next unit of work, since the group is to stop."""
        with self._changed:
            return self._num_entered >= self._last_unit

    def enter(self) -> None:
        """Begin the next unit of work. Raises StopRequested if the ranks have agreed to stop before it."""
        with self._changed:
            while self._num_entered >= self._last_unit:
                if self._is_agreed:
                    raise StopRequested
                self._changed.wait()
            self._num_entered += 1

    def _watch(self) -> None:
        if self._index == 0:
            self._request.report_work()
        while not self._is_made():
            if self._closed.wait(self._poll_every_s):
                return
        with self._changed:
            self._last_unit = self._num_entered
        self._vote.propose(self._index, self._num_entered)
        while (last := self._settled()) is None:
            if self._closed.wait(self._poll_every_s / 4):
                return
        with self._changed:
            self._last_unit, self._is_agreed = last, True
            self._changed.notify_all()

    def _is_made(self) -> bool:
        """Return whether the request is made; False if the table does not answer, which training does not need."""
        try:
            return self._request.is_made()
        except Exception as error:
            log.debug("the request to stop could not be read: %s", error)
            return False

    def _settled(self) -> int | None:
        """Return the unit that the vote was settled on; as rank 0, settle it once all ranks have proposed one."""
        if self._index == 0:
            proposals = self._vote.proposals(self._world)
            if len(proposals) < self._world:
                return None
            self._vote.agree(max(proposals))
        return self._vote.agreed()
