"""Kill this process at the n-th point of its writes: before or after a file is written or a process started."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from pipelines.handoff.ledger import PULSE_THREAD
from pipelines.storage import Storage


def kill_at(number: int) -> None:
    """Send SIGKILL to this process at that point, counted from 1, whichever thread reaches it.

    Not counted are the thread of the pulse, which writes by the clock, and what a write calls in turn, which depends
    on the file system: the same number would mean another point.
    """
    count = 0
    inside = threading.local()

    def point() -> None:
        nonlocal count
        if threading.current_thread().name == PULSE_THREAD or getattr(inside, "depth", 0):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            point()
            inside.depth = getattr(inside, "depth", 0) + 1
            try:
                found = function(*arguments, **options)
            finally:
                inside.depth -= 1
            point()
            return found

        return call

    Storage.write = watched(Storage.write)
    Storage.write_new = watched(Storage.write_new)
    subprocess.Popen = watched(subprocess.Popen)  # pyright: ignore[reportAttributeAccessIssue]
