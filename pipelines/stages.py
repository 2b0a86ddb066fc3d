"""What a command does before its first step: said on the console if it takes long, and timed for `mae bench start`."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

TIMELINE = "MAE_TIMELINE"
"""Environment variable with the file to which the processes of a command append their stages; none if not set."""

SAY_EVERY_S = 20.0


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Time the block, and say what it does if it takes long. Errors pass through."""
    started_s = time.time()
    with saying(what):
        yield
    note(what, started_s)


@contextmanager
def saying(what: str, is_over: Callable[[], bool] = lambda: False, every_s: float | None = None) -> Iterator[None]:
    """Log what the block waits for every `every_s` seconds, such as "compiling, 20 s so far", until it ends.

    `is_over` is asked before each line, and ends them early.
    """
    started_s, has_ended = time.monotonic(), threading.Event()

    def say() -> None:
        while not has_ended.wait(every_s or SAY_EVERY_S) and not is_over():
            log.info("%s, %.0f s so far", what, time.monotonic() - started_s)

    threading.Thread(target=say, name="saying", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def note(what: str, started_s: float | None = None, ended_s: float | None = None) -> None:
    """Append a stage to the timeline, if there is one; times are in Unix seconds.

    Without them, the stage started with this process and ends now.
    """
    path = os.environ.get(TIMELINE)
    if not path:
        return
    if started_s is None:
        import psutil

        started_s = psutil.Process().create_time()
    line = json.dumps({"what": what, "pid": os.getpid(), "started_s": started_s, "ended_s": ended_s or time.time()})
    with Path(path).open("a") as file:
        file.write(f"{line}\n")
