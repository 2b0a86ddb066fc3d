"""Processes of this machine: find them by their environment, end them, and wait for what they do.

Tests read this file where it lies.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
START_LIMIT_S = 300.0
END_LIMIT_S = 30.0
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of include/linux/sched.h


def until(
    probe: Callable[[], T | None],
    what: str,
    limit_s: float = START_LIMIT_S,
    *,
    alive: Callable[[], bool] = lambda: True,
    log: Path | None = None,
) -> T:
    """Wait until a probe returns something true; return it. An OSError or KeyError of the probe means not yet.

    Raises TimeoutError after the limit, and RuntimeError if what should answer has ended.
    """
    end_s = time.monotonic() + limit_s
    while True:
        was_alive, is_late = alive(), time.monotonic() > end_s
        with suppress(OSError, KeyError):
            if found := probe():
                return found
        if is_late or not was_alive:
            said = "\n" + log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
            if was_alive:
                raise TimeoutError(f"waited {limit_s:g} s for {what}{said}")
            raise RuntimeError(f"it ended before {what}{said}")
        time.sleep(0.1)


def marked_processes(mark: str) -> list[int]:
    """Ids of the running processes that were started with this `NAME=value` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in environment_of(folder).split(b"\0"):
                found.append(int(folder.name))
    return found


def environment_of(folder: Path) -> bytes:
    """Return the environment of the running process of this folder of /proc, in the kernel's form.

    A process that is just executing its program gets it in a moment: between the end of the old program, for which
    `subprocess.Popen` waits, and the start of the new one, Linux has an empty `environ`, whose address in `stat` is 0.
    So have kernel threads and zombies, which never get one.
    """
    while True:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        state, flags, address = fields[0], int(fields[6]), int(fields[47])
        if state in "ZX" or flags & _KERNEL_THREAD:
            return b""
        if address:
            return (folder / "environ").read_bytes()
        (folder / "environ").open("rb").close()  # another user's process, whose address reads as 0, refuses this
        time.sleep(0.001)


def end_all(mark: str) -> None:
    """Kill every process that has this `NAME=value` in its environment, but for the caller, and wait for their end."""

    def others() -> list[int]:
        return [process_id for process_id in marked_processes(mark) if process_id != os.getpid()]

    until(lambda: not kill(others()), "the end of all processes", END_LIMIT_S)


def kill(process_ids: Sequence[int]) -> int:
    """Kill processes; return how many there were."""
    for process_id in process_ids:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    return len(process_ids)
