"""State of an unfinished preparation, in `.prepare/` next to its shards, from which the next run resumes."""

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
    """Listings and summaries of slices. A slice is done if it has a summary.

    A slice's listing is written first, and its summary after its shards are complete. Both names contain a digest of
    the listing, which includes file versions. So the summary of a slice whose images have changed is ignored.
    """

    def __init__(self, target: Storage) -> None:
        self._target = target
        self._digests = ""
        """Digests of all slices by number, concatenated: one string, because every task receives it."""

    def claim(self, identity: dict[str, Any]) -> None:
        """Claim the target for this preparation.

        Raises UserError if it holds something else, or another unfinished preparation.
        """
        claim = json.dumps(identity, indent=1, sort_keys=True).encode()
        if not self._target.exists(_CLAIM) and not self._target.is_empty():
            raise UserError(
                f"{self._target.uri} is not empty and holds no prepared dataset; choose another folder, or empty it"
            )
        # If two preparations start concurrently, one gets an error.
        if not self._target.write_new(_CLAIM, claim):
            raise UserError(
                f"{self._target.uri} holds the unfinished preparation of another source or config; "
                "choose another folder, or empty it"
            )

    def put_slices(self, slices: Iterable[Slice]) -> int:
        """Write the listing of every slice; return their number. Results of slices that have changed are deleted."""
        known = self._names("slices")
        digests: list[str] = []
        num_changed = 0
        for part in slices:
            content = part.to_json()
            digests.append(_digest(content))
            existing = known.get(part.number, set())
            if existing != {digests[-1]}:
                stale = existing - {digests[-1]}
                num_changed += bool(stale)
                self._replace(part, content, digests[-1], stale)
        self._digests = "".join(digests)
        if num_changed:
            log.warning("images of %d slices have changed since they were prepared; preparing them again", num_changed)
        self._undo_second_pass()
        return len(digests)

    def begin_second_pass(self) -> None:
        """Record that shards of these slices may lack duplicates from now on."""
        self._target.write(self._second, b"")

    def slice(self, number: int) -> Slice:
        return Slice.from_json(self._target.read(self._path("slices", number)))

    def put(self, summary: SliceSummary, *, again: bool) -> None:
        """Record that the slice is done: in the first pass, or in the second (`again`), which omits duplicates."""
        self._target.write(self._path("again" if again else "done", summary.number), summary.to_json())

    def summary(self, number: int) -> SliceSummary:
        """Return the slice's summary from the first pass."""
        return SliceSummary.from_json(self._target.read(self._path("done", number)))

    def summaries(self, *, again: bool = False) -> Iterator[SliceSummary]:
        """Yield the summaries of all done slices by number; with `again`, those of the second pass where they exist."""
        first, second = self.done(), self.done(again=True) if again else set()
        paths = [self._path("again" if number in second else "done", number) for number in sorted(first)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(paths), _THREADS):
                yield from map(SliceSummary.from_json, pool.map(self._target.read, paths[start : start + _THREADS]))

    def done(self, *, again: bool = False) -> set[int]:
        """Return the numbers of the slices that are done."""
        existing = self._names("again" if again else "done")
        return {number for number, digests in existing.items() if self._digest_of(number) in digests}

    def remove(self) -> None:
        """Delete the work folder and the temporary files of killed tasks; the claim goes last."""
        self._target.delete_temporaries()
        self._delete([path for path, _ in self._target.walk(_FOLDER) if path != _CLAIM])
        self._target.delete(_CLAIM)
        self._target.delete_empty(_FOLDER)

    @property
    def exists(self) -> bool:
        return self._target.exists(_CLAIM)

    def _replace(self, part: Slice, content: bytes, digest: str, stale: set[str]) -> None:
        """Write the slice's listing. Stale listings are deleted last, so that they are found again after a kill."""
        if stale:
            summaries = [_path(kind, part.number, old) for old in stale for kind in ("done", "again")]
            self._delete([*summaries, *part.outputs])
        self._target.write(_path("slices", part.number, digest), content)
        self._delete([_path("slices", part.number, old) for old in stale])

    def _undo_second_pass(self) -> None:
        """Mark every slice as not done if a second pass over other slices has begun: it omitted other duplicates."""
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
        """Return the digests of the existing files of a kind, by slice number."""
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
