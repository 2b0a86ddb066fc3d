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

    The thread of the pulse is not counted: it writes by the clock, so that the same number would mean another point.
    """
    count = 0

    def point() -> None:
        nonlocal count
        if threading.current_thread().name == PULSE_THREAD:
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            point()
            found = function(*arguments, **options)
            point()
            return found

        return call

    Storage.write = watched(Storage.write)
    Storage.write_new = watched(Storage.write_new)
    subprocess.Popen = watched(subprocess.Popen)  # pyright: ignore[reportAttributeAccessIssue]
