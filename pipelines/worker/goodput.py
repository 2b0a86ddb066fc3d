"""Goodput: shares of a run's wall-clock time in steps, in waits of four kinds, in recovery and in the rest."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["steps", "data", "checkpoint", "evaluation", "recovery", "other"]
KINDS: tuple[Kind, ...] = ("steps", "data", "checkpoint", "evaluation", "recovery", "other")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a worker group by a driver. Times are Unix seconds."""

    launched_s: float
    died_s: float | None = None
    """When the previous driver of the run was last alive; None if there was none."""


class Clock:
    """Seconds of each kind over all attempts at a run. Rank 0's clock is the run's.

    It never synchronises with a device, so a step's time includes only what the host waits for.
    """

    def __init__(self, kind: Kind = "other", seconds: Mapping[str, float] | None = None) -> None:
        self._seconds: dict[Kind, float] = {kind: float((seconds or {}).get(kind, 0.0)) for kind in KINDS}
        self._kind: Kind = kind
        self._since_s = time.perf_counter()

    @classmethod
    def started(cls, attempt: Attempt, saved: Mapping[str, Any] | None) -> "Clock":
        """Start the clock of an attempt, from the `saved` clock of the checkpoint that it resumes from, if any.

        Work done after that checkpoint is lost. So the time from the checkpoint to now counts as recovery, except for
        the time when no driver ran.
        """
        now_s = time.time()
        if saved is None:
            clock = cls("other")
            clock._seconds["other"] = max(0.0, now_s - attempt.launched_s)
            return clock
        clock, saved_s = cls("recovery", saved["seconds"]), float(saved["time_s"])
        if attempt.launched_s <= saved_s:
            clock._seconds["recovery"] += max(0.0, now_s - saved_s)
        else:
            lost_s = max(0.0, (attempt.died_s or saved_s) - saved_s)
            clock._seconds["recovery"] += lost_s + max(0.0, now_s - attempt.launched_s)
        return clock

    @contextmanager
    def spent(self, kind: Kind) -> Iterator[None]:
        """Count the time of the block as this kind. Blocks nest. Recovery ends after the first block of steps."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch("other" if before == "recovery" and kind == "steps" else before)

    def saved(self) -> dict[str, Any]:
        """Return the state of the clock for a checkpoint's metadata."""
        self._switch(self._kind)
        return {"seconds": {kind: round(value, 3) for kind, value in self._seconds.items()}, "time_s": time.time()}

    def shares(self) -> dict[str, float]:
        """Return the share of each kind; they sum to 1."""
        self._switch(self._kind)
        total_s = max(1e-9, sum(self._seconds.values()))
        return {kind: value / total_s for kind, value in self._seconds.items()}

    def _switch(self, kind: Kind) -> Kind:
        now_s = time.perf_counter()
        self._seconds[self._kind] += now_s - self._since_s
        self._since_s = now_s
        before, self._kind = self._kind, kind
        return before
