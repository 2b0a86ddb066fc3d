"""Where the wall-clock of a run goes: steps, waiting for data or for a checkpoint, recovery, everything else."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["steps", "data", "checkpoint", "recovery", "other"]
KINDS: tuple[Kind, ...] = ("steps", "data", "checkpoint", "recovery", "other")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """When the driver launched the worker group, and when the driver before it was last alive, in Unix seconds."""

    launched_s: float
    died_s: float | None = None


class Clock:
    """Seconds of each kind over all attempts at a run. Rank 0's is the run's; nothing here waits for a device."""

    def __init__(self, kind: Kind = "other", seconds: Mapping[str, float] | None = None) -> None:
        self._seconds: dict[Kind, float] = {kind: float((seconds or {}).get(kind, 0.0)) for kind in KINDS}
        self._kind: Kind = kind
        self._since_s = time.perf_counter()

    @classmethod
    def started(cls, attempt: Attempt, saved: Mapping[str, Any] | None) -> "Clock":
        """The clock of an attempt that starts from a checkpoint with that `saved` clock, or from nothing.

        What was done after the checkpoint is done again, so the time from it to now is recovery, but for the time
        when no driver ran.
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
        """The time of the block counts as of this kind; recovery is over with the first step."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch("other" if before == "recovery" and kind == "steps" else before)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of the clock."""
        self._switch(self._kind)
        return {"seconds": {kind: round(value, 3) for kind, value in self._seconds.items()}, "time_s": time.time()}

    def shares(self) -> dict[str, float]:
        """The share of each kind; together 1."""
        self._switch(self._kind)
        total_s = max(1e-9, sum(self._seconds.values()))
        return {kind: value / total_s for kind, value in self._seconds.items()}

    def _switch(self, kind: Kind) -> Kind:
        now_s = time.perf_counter()
        self._seconds[self._kind] += now_s - self._since_s
        self._since_s = now_s
        before, self._kind = self._kind, kind
        return before
