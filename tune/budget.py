"""The time that a sweep may take, over all its starts, and which groups of trials still fit into it."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.storage import Storage, open_storage
from tune.trial import Trial

_SPENT = "spent.json"


class Clock:
    """Seconds that a sweep has run, those of earlier starts included; a killed driver loses those since `save`."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._started_s = storage, time.monotonic()
        self._before_s = json.loads(storage.read(_SPENT))["wall_s"] if storage.exists(_SPENT) else 0.0

    def spent_s(self) -> float:
        """Return the seconds up to now."""
        return self._before_s + time.monotonic() - self._started_s

    def save(self) -> None:
        """Write the seconds up to now into the sweep's folder."""
        self._storage.write(_SPENT, json.dumps({"wall_s": round(self.spent_s(), 1)}).encode())


@dataclass(frozen=True)
class Budget:
    """A point in time, by which a group that is started should have ended."""

    deadline_s: float
    """In Unix seconds."""
    ledger: dict[str, str]
    """Folder of every trial of the sweep, and what its duration depends on."""

    @classmethod
    def of(cls, trials: Sequence[Trial], rest_s: float) -> "Budget":
        """Return the budget of a sweep that may run for `rest_s` seconds from now."""
        return cls(time.time() + rest_s, {trial.folder: _cost_key(trial) for trial in trials})

    @property
    def rest_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.time()

    def covers(self, group: Sequence[Trial]) -> bool:
        """Return whether the group will probably end in time, by the durations of the trials that have ended.

        A trial is expected to take as long as those of its point with other seeds or, if none has ended, as the mean
        of all. Without any, nothing is known and the group may start.
        """
        known: dict[str, list[float]] = {}
        for folder, cost_key in self.ledger.items():
            entry = _entry(folder)
            if entry and entry.get("wall_s"):
                known.setdefault(cost_key, []).append(entry["wall_s"])
        every = [wall_s for some in known.values() for wall_s in some] or [0.0]
        expected_s = sum(statistics.mean(known.get(_cost_key(trial), every)) for trial in group)
        return expected_s <= self.rest_s


def _cost_key(trial: Trial) -> str:
    return json.dumps([trial.pretrain is None, trial.point], sort_keys=True)


def _entry(folder: str) -> dict[str, Any] | None:
    storage = open_storage(folder)
    return json.loads(storage.read("trial.json")) if storage.exists("trial.json") else None
