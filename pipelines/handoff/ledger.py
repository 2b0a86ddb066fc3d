"""The record of what was started: numbered attempts of a training, each claimed, begun and ended at most once.

    NNN-claim.json   one reconciler decided to start attempt NNN (created, never replaced)
    NNN-begun.json   the process of the attempt has begun, or the attempt was abandoned before (created)
    NNN-pulse.json   the process was alive at this time (replaced while it lives)
    NNN-end.json     how the attempt ended (created)
    NNN-retry.json   a person asked for more attempts: failures up to this number are forgiven

Each file but the pulse is a conditional create, of which the storage lets one writer win: of two reconcilers one
claims, and a process that starts late finds that its attempt was abandoned, and ends. Attempts that Ray's job server
runs have neither begun nor pulse: the server takes each submission id once.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from pipelines.storage import Storage

FOLDER = ".handoff"
DEAD_AFTER_S = 60.0
"""Age of the last sign of life beyond which a process on another machine counts as dead."""
PULSE_THREAD = "handoff-pulse"
"""Name of the thread that writes the pulse of an attempt."""
_PULSE_EVERY_S = 10.0
_LONGEST_WAIT_S = 3600.0
_FILE = re.compile(r"(\d{3,})-(claim|begun|end|retry)\.json")

Place = Literal["here", "ray"]


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of some machine, told apart from a later one with the same id by its start."""

    host: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "Process":
        return cls(host=_host(), pid=os.getpid(), started=_start_of(os.getpid()))

    @property
    def is_on_this_host(self) -> bool:
        return self.host == _host()

    @property
    def is_alive(self) -> bool:
        """Whether it lives; for a process of this machine only."""
        return _start_of(self.pid) == self.started


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Decision to start an attempt."""

    where: Place
    words: tuple[str, ...]
    by: Process
    time_s: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, kw_only=True)
class End:
    """How an attempt ended."""

    status: int | None
    """Exit status of the command; None if the process vanished or never began."""
    said: str
    time_s: float
    kind: Literal["succeeded", "failed", "interrupted", "stopped", "never began"]
    """interrupted: stopped in order with its reconciler, so that it resumes; stopped: by a person, so that it waits."""


class Ledger:
    """Attempts of one training. Any process may hold one; it keeps nothing in memory."""

    def __init__(self, output: Storage, name: str) -> None:
        self.output, self.name = output, name

    def last(self) -> int:
        """Return the number of the last attempt; 0 if there is none."""
        return max((number for number, what in self._files() if what == "claim"), default=0)

    def claim(self, number: int, claim: Claim) -> bool:
        """Claim the attempt; return False if another reconciler has."""
        return self._create(number, "claim", asdict(claim))

    def claimed(self, number: int) -> Claim:
        values = self._read(number, "claim") or {}
        return Claim(**{**values, "words": tuple(values["words"]), "by": Process(**values["by"])})

    def begin(self, number: int, token: str) -> bool:
        """Note that this process is the attempt; return False if it was abandoned or is another process'."""
        if self.claimed(number).token != token:
            return False
        self._write_pulse(number)
        return self._create(number, "begun", {"by": asdict(Process.this())})

    def abandon(self, number: int, said: str, now_s: float) -> None:
        """End an attempt that has not begun, for good; do nothing if it has."""
        if self._create(number, "begun", {"by": None}) or self._begun(number) is None:
            self.end(number, End(status=None, said=said, time_s=now_s, kind="never began"))

    def end(self, number: int, end: End) -> None:
        """Note how the attempt ended, unless that is known."""
        self._create(number, "end", asdict(end))

    def ended(self, number: int) -> End | None:
        """Return how the attempt ended; None if it has not, as far as is known."""
        values = self._read(number, "end")
        return End(**values) if values else None

    def is_begun(self, number: int) -> bool:
        """Return whether the process of the attempt has begun."""
        return self._begun(number) is not None

    def settle(self, number: int, now_s: float) -> bool:
        """Return whether an attempt on some machine runs or is about to; if it has died, note its end.

        A process of this machine is looked up by its id; another one's last sign of life must not be older than
        `DEAD_AFTER_S`.
        """
        if self.ended(number):
            return False
        claim, begun = self.claimed(number), self._begun(number)
        if begun is None:
            starts = claim.by.is_alive if claim.by.is_on_this_host else now_s - claim.time_s < DEAD_AFTER_S
            if not starts:
                self.abandon(number, "its reconciler died before it began", now_s)
            # It may have begun since.
            return self.ended(number) is None
        pulse_s = (self._read(number, "pulse") or {}).get("time_s", claim.time_s)
        lives = begun.is_alive if begun.is_on_this_host else now_s - pulse_s < DEAD_AFTER_S
        if not lives:
            said = f"process {begun.pid} on {begun.host} ended without a word"
            self.end(number, End(status=None, said=said, time_s=now_s, kind="failed"))
        return lives

    def forgive(self) -> None:
        """Let the training be tried again, however often it failed."""
        if last := self.last():
            self._create(last, "retry", {"time_s": time.time()})

    def failures(self) -> list[End]:
        """Return the ends of failed attempts since a person last asked for more, and of one that a person stopped."""
        files = self._files()
        forgiven = max((number for number, what in files if what == "retry"), default=0)
        ends = [self.ended(number) for number, what in sorted(files) if what == "end" and number > forgiven]
        return [end for end in ends if end and end.kind not in ("interrupted", "never began")]

    def _files(self) -> list[tuple[int, str]]:
        found = (_FILE.fullmatch(path.rpartition("/")[2]) for path, _ in self.output.list(f"{FOLDER}/{self.name}"))
        return [(int(match[1]), match[2]) for match in found if match]

    def _begun(self, number: int) -> Process | None:
        """Return the process of the attempt; None if it has not begun, or was abandoned."""
        by = (self._read(number, "begun") or {}).get("by")
        return Process(**by) if by else None

    def _write_pulse(self, number: int) -> None:
        self.output.write(self._path(number, "pulse"), json.dumps({"time_s": time.time()}).encode())

    def _create(self, number: int, what: str, values: dict[str, Any]) -> bool:
        # A nonce, since equal bytes count as the writer's own.
        content = json.dumps(values | {"nonce": uuid.uuid4().hex}, indent=1).encode()
        return self.output.write_new(self._path(number, what), content)

    def _read(self, number: int, what: str) -> dict[str, Any] | None:
        try:
            values = json.loads(self.output.read(self._path(number, what)))
        except FileNotFoundError:
            return None
        values.pop("nonce", None)
        return values

    def _path(self, number: int, what: str) -> str:
        return f"{FOLDER}/{self.name}/{number:03d}-{what}.json"


def unended(output: Storage) -> list[str]:
    """Return the names of all trainings whose last attempt has no end, from one listing."""
    files: dict[str, set[tuple[int, str]]] = {}
    for path, _ in output.list(FOLDER):
        _, name, file = path.split("/")
        if match := _FILE.fullmatch(file):
            files.setdefault(name, set()).add((int(match[1]), match[2]))

    def is_unended(found: set[tuple[int, str]]) -> bool:
        last = max((number for number, what in found if what == "claim"), default=0)
        return last > 0 and (last, "end") not in found

    return sorted(name for name, found in files.items() if is_unended(found))


def wait_s(failures: Iterable[End], retry_s: float) -> float:
    """Return the seconds from the last failure to the next attempt: doubled with each, at most an hour."""
    return min(_LONGEST_WAIT_S, retry_s * 2 ** (len(list(failures)) - 1))


def run_attempt(ledger: Ledger, number: int, token: str, log: Path, work: Callable[[list[str]], int]) -> int:
    """Be the process of an attempt: begin it, do its work on the claim's words with a pulse, and note its end.

    Returns the exit status of the work, or 0 at once if the attempt is abandoned or another process'.
    """
    if not ledger.begin(number, token):
        return 0
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_PULSE_EVERY_S):
            # The pulse must outlive an outage of the storage, and the work must not end with it.
            with suppress(OSError):
                ledger._write_pulse(number)

    thread = threading.Thread(target=beat, name=PULSE_THREAD, daemon=True)
    thread.start()
    try:
        status = work(list(ledger.claimed(number).words))
    finally:
        stop.set()
        thread.join()
    ledger.end(number, end_of(status, log))
    return status


def end_of(status: int, log: Path) -> End:
    """Describe the end of a process by its exit status, or minus the signal that killed it, and its log's last line."""
    status = 128 - status if status < 0 else status
    kind = "interrupted" if status in (130, 143) else "failed" if status else "succeeded"
    return End(status=status, said=_last_line(log), time_s=time.time(), kind=kind)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]


def _host() -> str:
    """Name the machine, since when it runs, and the namespace of its process ids, in which containers differ."""
    with suppress(OSError):
        since = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {since} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _start_of(pid: int) -> str:
    """Return when the process started; empty if it has ended. On Linux in clock ticks, whatever the clock is set to."""
    try:
        if not Path("/proc/self/stat").exists():
            return f"{psutil.Process(pid).create_time():.2f}"
        # Its second field, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]
