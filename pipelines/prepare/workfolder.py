"""What an unfinished preparation keeps beside its shards, in `.prepare/`, so that the next one goes on from there."""

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import SliceSummary
from pipelines.storage import Storage

log = logging.getLogger(__name__)

_FOLDER = ".prepare"
_CLAIM = f"{_FOLDER}/claim.json"
_THREADS = 8


class WorkFolder:
    """A slice's listing is written first, its summary once its shards are whole: what has a summary is done."""

    def __init__(self, target: Storage) -> None:
        self._target = target

    def claim(self, identity: dict[str, Any]) -> None:
        """The place is ours. Raises ValueError where it holds something else, or another's unfinished work."""
        claim = json.dumps(identity, indent=1, sort_keys=True).encode()
        if not self._target.exists(_CLAIM) and not self._target.is_empty():
            raise ValueError(
                f"{self._target.uri} is not empty and holds no dataset of ours; choose another folder, or empty it"
            )
        # Of two that begin at once, one is told.
        if not self._target.write_new(_CLAIM, claim):
            raise ValueError(
                f"{self._target.uri} holds the unfinished preparation of another source or config; "
                "choose another folder, or empty it"
            )

    def put_slices(self, slices: Iterable[Slice]) -> int:
        """Every slice is there; how many there are."""
        known = {path for path, _ in self._target.walk(f"{_FOLDER}/slices")}
        count = 0
        for part in slices:
            count += 1
            path = _path("slices", part.number)
            if path not in known:
                self._target.write(path, part.to_json())
        return count

    def slice(self, number: int) -> Slice:
        return Slice.from_json(self._target.read(_path("slices", number)))

    def put(self, summary: SliceSummary, *, again: bool) -> None:
        """The slice is done: for the first time, or `again`, without duplicates."""
        self._target.write(_path("again" if again else "done", summary.number), summary.to_json())

    def summary(self, number: int) -> SliceSummary:
        """What became of the slice when it was first done."""
        return SliceSummary.from_json(self._target.read(_path("done", number)))

    def summaries(self, *, again: bool = False) -> Iterator[SliceSummary]:
        """Of all slices that are done, by number; with `again`, the second summary where there is one."""
        first, second = self.done(), self.done(again=True) if again else set()
        paths = [_path("again" if number in second else "done", number) for number in sorted(first)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(paths), _THREADS):
                yield from map(SliceSummary.from_json, pool.map(self._target.read, paths[start : start + _THREADS]))

    def done(self, *, again: bool = False) -> set[int]:
        """Numbers of the slices that are done."""
        folder = "again" if again else "done"
        return {int(path[-11:-5]) for path, _ in self._target.walk(f"{_FOLDER}/{folder}")}

    def remove(self) -> None:
        """Nothing of the work is left, nor of what killed tasks had begun to write; the claim goes last."""
        self._target.delete_temporaries()
        paths = [path for path, _ in self._target.walk(_FOLDER) if path != _CLAIM]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._target.delete, paths))
        self._target.delete(_CLAIM)
        self._target.delete_empty(_FOLDER)

    @property
    def exists(self) -> bool:
        return self._target.exists(_CLAIM)


def _path(kind: str, number: int) -> str:
    return f"{_FOLDER}/{kind}/{number:06d}.json"
