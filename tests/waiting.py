"""Wait in tests: for a condition, for the end of a thread or process, or for a duration. All deadlines are here.

A deadline only stops a test that would never end, so it is generous: other work may slow the machine down. A test that
may use one of more than 600 s, pytest's own limit, has its own `timeout` mark.
"""

import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")

KILLED_DEADLINE_S = 20.0
"""A process that was killed is gone."""
REQUEST_DEADLINE_S = 10.0
"""A running server has sent a response."""
EVENT_DEADLINE_S = 60.0
"""Another thread, or a process that is already running, does what it was told."""
COMMAND_DEADLINE_S = 120.0
"""A command without Ray has ended; a server has sent its first response."""
JOB_DEADLINE_S = 300.0
"""A training process without Ray or a short job of Ray has ended; a hung worker was noticed."""
RUN_DEADLINE_S = 900.0
"""A run has reached a step or its end, with the start of Ray and of its workers."""
PIPELINE_DEADLINE_S = 1500.0
"""`mae demo` has ended."""


def wait_until(
    condition: Callable[[], T | None],
    what: str | Callable[[], str],
    deadline_s: float = EVENT_DEADLINE_S,
    *,
    alive: Callable[[], bool] = lambda: True,
    errors: tuple[type[Exception], ...] = (),
    poll_every_s: float = 0.01,
) -> T:
    """Return the first true value of the condition, in which `errors` mean that it is not met yet.

    Raises TimeoutError after the deadline, and RuntimeError as soon as what should meet the condition is not `alive`;
    both say `what` was awaited.
    """
    end_s = time.monotonic() + deadline_s
    while True:
        # Before the condition: what ended just now may have met it as the last thing that it did.
        is_alive, is_late = alive(), time.monotonic() > end_s
        cause: Exception | None = None
        try:
            if found := condition():
                return found
        except errors as error:
            cause = error
        if is_late or not is_alive:
            awaited = what if isinstance(what, str) else what()
            if is_alive:
                raise TimeoutError(f"waited {deadline_s:g} s for {awaited}") from cause
            raise RuntimeError(f"it ended before {awaited}") from cause
        time.sleep(poll_every_s)  # noqa: TID251


def join(member: threading.Thread | BaseProcess, deadline_s: float = EVENT_DEADLINE_S) -> None:
    """Wait for the end of a thread or process. Raises TimeoutError after the deadline."""
    member.join(deadline_s)
    if member.is_alive():
        raise TimeoutError(f"waited {deadline_s:g} s for the end of {member.name}")


def let_pass(duration_s: float) -> None:
    """Let time pass where the duration is part of the test, such as that of an outage. To wait, use `wait_until`."""
    time.sleep(duration_s)  # noqa: TID251
