"""SIGTERM and Ctrl-C: the first one ends a command in order, the second one ends it at once.

The first signal raises `Interrupted` in the main thread. It is a KeyboardInterrupt, so that every block that cleans up
after Ctrl-C does so after SIGTERM too. Where a worker group runs, `pipelines.drivers.launch` catches it and waits for
the group's checkpoint. Imports only the standard library at the top, so that a command can begin with it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_ONE_CAUSE_S = 0.5
"""Time within which signals have one cause: `timeout` sends SIGTERM to its command and again to the process group."""

_first: signal.Signals | None = None
_first_s = 0.0
_is_handling = False
_is_work_left = False
_is_deferring = False
_is_lost = False
_status: int | None = None
"""Exit status of the command, once it has ended."""


class Interrupted(KeyboardInterrupt):
    """The command was told to end. Its text says how far the command got; empty if nobody could say."""


def handle_signals() -> None:
    """Raise Interrupted in the main thread on the first signal, and end the process on the second.

    A signal that is ignored stays ignored, as SIGINT of a command that a script started in the background.
    """
    global _is_handling, _status
    if threading.current_thread() is not threading.main_thread():
        return
    _status = None
    if not _is_handling:
        _report_others(sys.unraisablehook)
    _is_handling = True
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def handle_signals_again() -> None:
    """Replace the handlers of a library that installed its own in place of ours; do nothing if ours never were."""
    if _is_handling:
        handle_signals()


def die_of_sigterm() -> None:
    """Let SIGTERM end this process at once, whatever handler it has; any thread may call it.

    For an actor of Ray, whose main thread waits in C++, where no Python handler runs. The one that Ray installs would
    run when the actor exits, inside of the first destructor, and the terminal would show "Exception ignored in".
    """
    ctypes.pythonapi.PyOS_setsig(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_DFL)))


def first_signal() -> signal.Signals:
    """Return the signal that interrupted this process."""
    return _first or signal.SIGINT


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Raise the Interrupted of a signal that arrives in the block only after it, so that the block cleans up wholly."""
    global _is_deferring
    before = _first
    _is_deferring = True
    try:
        yield
    finally:
        _is_deferring = False
    if _first is not before:
        raise Interrupted


def end_with(status: int) -> NoReturn:
    """End the process with that status; a signal from now on ends it at once, since nothing is left to put in order.

    After a signal Python's own end is left out: Ray's C++ part, interrupted while it started, crashes in it.
    """
    global _status
    _status = status
    if _first is None and not _is_work_left:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    end_at_once(status)


@contextmanager
def interrupted_in_place_of_errors() -> Iterator[None]:
    """Raise Interrupted for an error of the block after a signal, such as of a lock whose `acquire` was interrupted.

    Python's `Event.wait` raises "release unlocked lock" for a KeyboardInterrupt at the wrong moment.
    """
    try:
        yield
    except Exception as error:
        if _first is None:
            raise
        raise Interrupted from error


@contextmanager
def stopping_at(progress: Callable[[], str]) -> Iterator[None]:
    """If the block is interrupted, raise Interrupted that says how far it got, as `progress` then says."""
    try:
        with interrupted_in_place_of_errors():
            yield
    except KeyboardInterrupt as interrupt:
        try:
            said = progress()
        except OSError as error:
            said = f"stopped; the storage does not answer ({error})"
        raise Interrupted(", ".join(filter(None, (said, str(interrupt))))) from None


def wait_for(work: Callable[[], object], stop: Callable[[], float]) -> None:
    """Run `work` on a thread, so that the main thread sees a signal at once, and wait for its end; raise its error.

    On a signal, call `stop`, which asks the work to end and returns for how many seconds to wait for that, and raise
    Interrupted. Its text is empty unless the work took longer; then its thread is left running (`is_work_left`). On
    another thread than the main one, which gets no signals, just run `work`.
    """
    global _is_work_left
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    errors: list[BaseException] = []
    # Not Thread.join(): if a signal interrupts it, it takes the running thread for an ended one.
    has_ended = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            has_ended.set()

    thread = threading.Thread(target=run, name="interruptible", daemon=True)
    try:
        with interrupted_in_place_of_errors():
            # The work may begin, and a signal arrive, before start() returns.
            thread.start()
            has_ended.wait()
    except KeyboardInterrupt:
        grace_s = stop()
        _is_work_left = not has_ended.wait(grace_s)
        is_late = _is_work_left and grace_s > 0
        raise Interrupted(f"the workers did not stop within {grace_s:g} s" if is_late else "") from None
    if errors:
        raise errors[0]


def is_work_left() -> bool:
    """Return whether a thread of `wait_for` was left running.

    It may be in a call of Ray, which can't be shut down then; `end_at_once` ends both.
    """
    return _is_work_left


def end_at_once(status: int) -> NoReturn:
    """End this process and all that it has started, without cleaning up."""
    with suppress(Exception):
        import psutil

        for process in psutil.Process().children(recursive=True):
            process.kill()
    os._exit(status)


def interrupted_by(number: signal.Signals) -> Interrupted:
    """Note the signal as the one that interrupted this process, tell the user, and return the error to raise."""
    global _first, _first_s
    _first, _first_s = number, time.monotonic()
    # Not by logging: the signal may have interrupted it.
    os.write(2, f"mae: {number.name}: stopping in order; a second one ends at once\n".encode())
    return Interrupted()


def _report_others(report: "Callable[[sys.UnraisableHookArgs], object]") -> None:
    """Raise an Interrupted again that was raised where nothing can be, as in a destructor; `report` all other errors.

    Python would print "Exception ignored in", and the command would continue.
    """

    def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        global _is_lost
        if not isinstance(unraisable.exc_value, Interrupted):
            report(unraisable)
            return
        _is_lost = True
        threading.Thread(target=_signal_again, daemon=True).start()

    sys.unraisablehook = on_unraisable


def _signal_again() -> None:
    # By then the destructor has returned, or it takes so long that it is interrupted once more.
    time.sleep(_ONE_CAUSE_S / 10)
    os.kill(os.getpid(), first_signal())


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _is_lost
    if _status is not None:
        end_at_once(_status)
    if _is_lost:
        _is_lost = False
        raise Interrupted
    if _first is None:
        interrupted = interrupted_by(signal.Signals(number))
        if _is_deferring:
            return
        raise interrupted
    if time.monotonic() - _first_s > _ONE_CAUSE_S:
        end_at_once(128 + number)
