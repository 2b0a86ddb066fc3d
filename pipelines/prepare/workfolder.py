"""What an unfinished preparation keeps beside its shards, in `.prepare/`, so that the next one goes on from there."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mae_core.errors import UserError
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import SliceSummary
from pipelines.storage import Storage

log = logging.getLogger(__name__)

_FOLDER = ".prepare"
_CLAIM = f"{_FOLDER}/claim.json"
_THREADS = 8
_DIGEST_CHARS = 16


class WorkFolder:
    """A slice's listing is written first, its summary once its shards are whole: what has a summary is done.

    Both are named by what the listing says, versions of files too, so that what an image was that has changed since
    counts for nothing.
    """

    def __init__(self, target: Storage) -> None:
        self._target = target
        self._digests = ""
        """Of all slices by number, end to end: one string, since every task is given it."""

    def claim(self, identity: dict[str, Any]) -> None:
        """The place is ours. Raises UserError where it holds something else, or another's unfinished work."""
        claim = json.dumps(identity, indent=1, sort_keys=True).encode()
        if not self._target.exists(_CLAIM) and not self._target.is_empty():
            raise UserError(
                f"{self._target.uri} is not empty and holds no dataset of ours; choose another folder, or empty it"
            )
        # Of two that begin at once, one is told.
        if not self._target.write_new(_CLAIM, claim):
            raise UserError(
                f"{self._target.uri} holds the unfinished preparation of another source or config; "
                "choose another folder, or empty it"
            )

    def put_slices(self, slices: Iterable[Slice]) -> int:
        """Every slice is there; how many there are. What was done of one that has changed since is undone."""
        known = self._names("slices")
        digests: list[str] = []
        num_changed = 0
        for part in slices:
            content = part.to_json()
            digests.append(_digest(content))
            there = known.get(part.number, set())
            if there != {digests[-1]}:
                stale = there - {digests[-1]}
                num_changed += bool(stale)
                self._replace(part, content, digests[-1], stale)
        self._digests = "".join(digests)
        if num_changed:
            log.warning("images of %d slices changed since these were done; they are done again", num_changed)
        self._undo_second_pass()
        return len(digests)

    def begin_second_pass(self) -> None:
        """From now on shards may lack the duplicates that these slices have."""
        self._target.write(self._second, b"")

    def slice(self, number: int) -> Slice:
        return Slice.from_json(self._target.read(self._path("slices", number)))

    def put(self, summary: SliceSummary, *, again: bool) -> None:
        """The slice is done: for the first time, or `again`, without duplicates."""
        self._target.write(self._path("again" if again else "done", summary.number), summary.to_json())

    def summary(self, number: int) -> SliceSummary:
        """What became of the slice when it was first done."""
        return SliceSummary.from_json(self._target.read(self._path("done", number)))

    def summaries(self, *, again: bool = False) -> Iterator[SliceSummary]:
        """Of all slices that are done, by number; with `again`, the second summary where there is one."""
        first, second = self.done(), self.done(again=True) if again else set()
        paths = [self._path("again" if number in second else "done", number) for number in sorted(first)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(paths), _THREADS):
                yield from map(SliceSummary.from_json, pool.map(self._target.read, paths[start : start + _THREADS]))

    def done(self, *, again: bool = False) -> set[int]:
        """Numbers of the slices that are done."""
        there = self._names("again" if again else "done")
        return {number for number, digests in there.items() if self._digest_of(number) in digests}

    def remove(self) -> None:
        """Nothing of the work is left, nor of what killed tasks had begun to write; the claim goes last."""
        self._target.delete_temporaries()
        self._delete([path for path, _ in self._target.walk(_FOLDER) if path != _CLAIM])
        self._target.delete(_CLAIM)
        self._target.delete_empty(_FOLDER)

    @property
    def exists(self) -> bool:
        return self._target.exists(_CLAIM)

    def _replace(self, part: Slice, content: bytes, digest: str, stale: set[str]) -> None:
        """The slice is there. What is stale goes last, so that after a kill it is still seen to be."""
        if stale:
            summaries = [_path(kind, part.number, old) for old in stale for kind in ("done", "again")]
            self._delete([*summaries, *part.outputs])
        self._target.write(_path("slices", part.number, digest), content)
        self._delete([_path("slices", part.number, old) for old in stale])

    def _undo_second_pass(self) -> None:
        """Where a second pass over other slices was begun, nothing is done: it left out other duplicates."""
        stale = [path for path, _ in self._target.walk(f"{_FOLDER}/second") if path != self._second]
        if stale:
            self._delete([path for kind in ("again", "done") for path, _ in self._target.walk(f"{_FOLDER}/{kind}")])
            self._delete(stale)

    @property
    def _second(self) -> str:
        return f"{_FOLDER}/second/{_digest(self._digests.encode())}"

    def _delete(self, paths: Iterable[str]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._target.delete, paths))

    def _names(self, kind: str) -> dict[int, set[str]]:
        """Digests of what is there, by number."""
        found: dict[int, set[str]] = {}
        for path, _ in self._target.walk(f"{_FOLDER}/{kind}"):
            number, _, digest = path.rpartition("/")[2].removesuffix(".json").partition("-")
            found.setdefault(int(number), set()).add(digest)
        return found

    def _path(self, kind: str, number: int) -> str:
        return _path(kind, number, self._digest_of(number))

    def _digest_of(self, number: int) -> str:
        return self._digests[number * _DIGEST_CHARS : (number + 1) * _DIGEST_CHARS]


def _path(kind: str, number: int, digest: str) -> str:
    return f"{_FOLDER}/{kind}/{number:06d}-{digest}.json"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_CHARS]
