"""Patience with a store that is away, overloaded, or cuts its answers short."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_patience_s: ContextVar[float] = ContextVar("patience_s", default=120.0)
_LONGEST_PAUSE_S = 5.0
_TOLD_AFTER_S = 1.0
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|curlCode|SLOW_?DOWN|THROTTL|SERVICE_?UNAVAILABLE|INTERNAL_?(FAILURE|ERROR)|REQUEST_?TIMEOUT|"
    r"HTTP status (429|5\d\d)|\((429|5\d\d)\) when calling|short body|connect to the endpoint|IncompleteRead|"
    r"Connection (was closed|reset|aborted|broken)|timed? ?out|ConditionalRequestConflict",
    re.IGNORECASE,
)


class StoreAwayError(OSError):
    """A store that gave no whole answer for as long as our patience lasted."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, a store that does not answer is waited for so long."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


@contextmanager
def briefly(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, a store that does not answer is waited for so long, or less if so it was."""
    with patience(min(seconds, _patience_s.get())):
        yield


def patiently(act: Callable[[], T], what: str) -> T:
    """What `act` returns; while the store is away, overloaded or cuts bodies short it is asked again.

    Raises StoreAwayError where that lasted as long as our patience, and at once what time will not mend.
    """
    limit_s, pause_s, started_s, told = _patience_s.get(), 0.1, time.monotonic(), False
    while True:
        try:
            return act()
        except Exception as error:
            if not _TRANSIENT.search(str(error)):
                raise
            reason = str(error).splitlines()[0]
        waited_s = time.monotonic() - started_s
        if waited_s + pause_s > limit_s:
            raise StoreAwayError(
                f"the store gave no whole answer for {waited_s:.0f} s ({reason}); start it or correct "
                "AWS_ENDPOINT_URL, and run the same command again"
            )
        if not told and waited_s > _TOLD_AFTER_S:
            log.warning("%s: the store gives no whole answer (%s); asking again for %.0f s", what, reason, limit_s)
            told = True
        # Jitter, so that clients do not return together.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
