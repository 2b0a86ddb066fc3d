"""Retry requests to a store that is unreachable or overloaded, or that cuts its responses short."""

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

_limit_s: ContextVar[float] = ContextVar("limit_s", default=120.0)
_LONGEST_PAUSE_S = 5.0
_WARN_AFTER_S = 1.0
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|curlCode|SLOW_?DOWN|THROTTL|SERVICE_?UNAVAILABLE|INTERNAL_?(FAILURE|ERROR)|REQUEST_?TIMEOUT|"
    r"HTTP status (429|5\d\d)|\((429|5\d\d)\) when calling|short body|connect to the endpoint|IncompleteRead|"
    r"Connection (was closed|reset|aborted|broken)|timed? ?out|ConditionalRequestConflict",
    re.IGNORECASE,
)


class StoreUnavailableError(OSError):
    """A store gave no complete response until the retry limit."""


@contextmanager
def retry_limit(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, retry failing requests to a store for up to `seconds`."""
    token = _limit_s.set(seconds)
    try:
        yield
    finally:
        _limit_s.reset(token)


@contextmanager
def retry_at_most(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, lower the retry limit to `seconds`, if it is higher."""
    with retry_limit(min(seconds, _limit_s.get())):
        yield


def retry(act: Callable[[], T], what: str) -> T:
    """Call `act` until it succeeds, retrying transient errors up to this thread's retry limit; return its result.

    `what` names the subject in the log. Raises StoreUnavailableError at the limit, and any other error at once.
    """
    limit_s, pause_s, started_s, warned = _limit_s.get(), 0.1, time.monotonic(), False
    while True:
        try:
            return act()
        except Exception as error:
            if not _TRANSIENT.search(str(error)):
                raise
            reason = str(error).splitlines()[0]
        waited_s = time.monotonic() - started_s
        if waited_s + pause_s > limit_s:
            raise StoreUnavailableError(
                f"the store gave no complete response for {waited_s:.0f} s ({reason}); start it or correct "
                "AWS_ENDPOINT_URL, and rerun the same command"
            )
        if not warned and waited_s > _WARN_AFTER_S:
            log.warning("%s: no complete response from the store (%s); retrying for %.0f s", what, reason, limit_s)
            warned = True
        # Jitter, so that clients do not retry in lockstep.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
