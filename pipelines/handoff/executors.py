"""Where attempts run: as processes of this machine, or as jobs of Ray's job server."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipelines.handoff.ledger import FOLDER, Claim, End, Ledger, Place, end_of
from pipelines.jobs import JobRecord, JobServer
from pipelines.runs.listing import is_driven
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

ATTEMPT = (sys.executable, "-m", "pipelines.cli.attempt")
"""Command of an attempt's process; its arguments are the output, the training's name, the number, token and log."""
_STOP_LIMIT_S = 150.0
"""Time for a training to save its checkpoint and end, with that of its workers."""


class Executor(Protocol):
    """A place for attempts."""

    where: Place

    def start(self, ledger: Ledger, number: int, claim: Claim) -> None:
        """Start a claimed attempt; do nothing if it was started before."""
        ...

    def is_running(self, ledger: Ledger, number: int, claim: Claim, now_s: float) -> bool | None:
        """Return whether the attempt runs; note its end if it does not. None: it was claimed and never started."""
        ...


class Here:
    """Processes of this machine, each of which embeds a Ray or uses the cluster of RAY_ADDRESS."""

    where: Place = "here"

    def __init__(self, wake: threading.Event, command: Sequence[str] = ATTEMPT) -> None:
        self._wake, self._command = wake, command
        self._children: dict[subprocess.Popen[bytes], tuple[Ledger, int, Path]] = {}
        self._lock = threading.Lock()

    @property
    def num_children(self) -> int:
        """Number of processes that this reconciler has started and that run."""
        return len(self._children)

    def start(self, ledger: Ledger, number: int, claim: Claim) -> None:
        log_file = _log_file(ledger, number)
        words = [*self._command, ledger.output.uri, ledger.name, str(number), claim.token, str(log_file)]
        with log_file.open("ab") as output:
            # A session of its own: Ctrl-C is for us, and we ask the process to stop in order.
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        log.info("%s: attempt %d is process %d, its log %s", ledger.name, number, child.pid, log_file)
        with self._lock:
            self._children[child] = ledger, number, log_file
        threading.Thread(target=self._await, args=(child,), name=f"attempt {child.pid}", daemon=True).start()

    def is_running(self, ledger: Ledger, number: int, claim: Claim, now_s: float) -> bool | None:
        # The ledger knows only that a process is gone; the parent knows its status and its log.
        for child in self._of(ledger, number):
            if child.poll() is None:
                return ledger.ended(number) is None
            self._note(child)
        return ledger.settle(number, now_s)

    def stop(self) -> int:
        """Ask all processes to stop in order and wait for them; return how many there were."""
        with self._lock:
            running = list(self._children)
        for child in running:
            child.send_signal(signal.SIGTERM)
        end_s = time.monotonic() + _STOP_LIMIT_S
        for child in running:
            try:
                child.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d did not stop within %g s and is left running", child.pid, _STOP_LIMIT_S)
        for child in running:
            if child.poll() is not None:
                self._note(child)
        return len(running)

    def _await(self, child: "subprocess.Popen[bytes]") -> None:
        child.wait()
        try:
            self._note(child)
        except OSError as error:
            log.warning("the end of process %d is not noted yet: %s", child.pid, error)
        self._wake.set()

    def _of(self, ledger: Ledger, number: int) -> "list[subprocess.Popen[bytes]]":
        """Return our process of the attempt, if its end is not noted yet."""
        with self._lock:
            known = list(self._children.items())
        return [child for child, (of, its, _) in known if (of.name, its) == (ledger.name, number)]

    def _note(self, child: "subprocess.Popen[bytes]") -> None:
        """Note the end of a process that did not say how it ended, such as by SIGKILL; several threads may do so."""
        with self._lock:
            known = self._children.get(child)
        if known and child.returncode != 0:
            ledger, number, log_file = known
            ledger.end(number, end_of(child.returncode, log_file))
        with self._lock:
            self._children.pop(child, None)


class OnRay:
    """Jobs of Ray's job server, which takes each submission id once."""

    where: Place = "ray"

    def __init__(self, server: JobServer) -> None:
        self._server = server

    def start(self, ledger: Ledger, number: int, claim: Claim) -> None:
        id = submission_id(ledger.name, number)
        metadata = {"mae.training": ledger.name, "mae.attempt": str(number)}
        if self._server.submit(shlex.join(["mae", *claim.words]), id=id, metadata=metadata):
            log.info("%s: attempt %d is job %s", ledger.name, number, id)

    def is_running(self, ledger: Ledger, number: int, claim: Claim, now_s: float) -> bool | None:
        if claim.where != self.where:
            return ledger.settle(number, now_s)
        found = self._server.find(submission_id(ledger.name, number))
        if found is None:
            # A cluster that was made anew knows nothing of a job of the one before, whose driver may still live.
            return True if run_is_alive(ledger, now_s) else None
        if found.has_ended:
            ledger.end(number, _end_of_job(found, now_s))
        return not found.has_ended


def submission_id(name: str, number: int) -> str:
    """Return the id under which the job server gets the attempt."""
    return f"mae-{name}-{number:03d}"


def run_is_alive(ledger: Ledger, now_s: float) -> bool:
    """Return whether some driver of the run is alive."""
    return is_driven(open_storage(ledger.output.join(ledger.name)), now_s)


def _end_of_job(record: JobRecord, now_s: float) -> End:
    kinds = {"SUCCEEDED": "succeeded", "STOPPED": "stopped"}
    return End(
        status=record.exit_status,
        said=" ".join(record.message.split())[-500:],
        time_s=record.end_s or now_s,
        kind=kinds.get(record.status, "failed"),  # pyright: ignore[reportArgumentType]
    )


def _log_file(ledger: Ledger, number: int) -> Path:
    """Return the file of an attempt's output: in the ledger if that is a local folder."""
    if ledger.output.is_local:
        folder = Path(ledger.output.uri) / FOLDER / ledger.name
    else:
        folder = Path(tempfile.gettempdir()) / f"mae-handoff-{os.getuid()}" / ledger.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number:03d}.log"
