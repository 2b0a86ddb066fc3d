"""State of unfinished work, such as `.prepare/` beside the shards of a preparation, from which the next run resumes."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from mae_core.errors import UserError
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import SliceSummary
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_THREADS = 8
_DIGEST_CHARS = 16
_PIECE_SUMMARY = "summary.json"


class Listing(Protocol):
    """A part of the work that one task does, such as a slice."""

    @property
    def number(self) -> int: ...

    @property
    def outputs(self) -> list[str]:
        """Every file that doing it may write."""
        ...

    def to_json(self) -> bytes: ...


class Summary(Protocol):
    """What is recorded of a part that is done."""

    @property
    def number(self) -> int: ...

    def to_json(self) -> bytes: ...


@dataclass(frozen=True)
class Purpose:
    """What the work folder is for: its name, and the words of its error messages."""

    folder: str
    result: str
    job: str


PREPARATION = Purpose(".prepare", "prepared dataset", "preparation")


class WorkFolder:
    """Listings and summaries of slices. A slice is done if it has a summary.

    A slice's listing is written first, and its summary after its shards are complete. Both names contain a digest of
    the listing, which includes file versions. So the summary of a slice whose images have changed is ignored.

    A slice may also be prepared in pieces, by several tasks. Each piece has a folder with shards, quarantine and, once
    it is complete, its summary; they are deleted when they have been joined.
    """

    def __init__(self, target: Storage, purpose: Purpose = PREPARATION) -> None:
        self._target, self._purpose = target, purpose
        self._digests = ""
        """Digests of all slices by number, concatenated: one string, because every task receives it."""

    def claim(self, identity: dict[str, Any]) -> None:
        """Claim the target for this preparation.

        Raises UserError if it holds something else, or another unfinished preparation.
        """
        claim = json.dumps(identity, indent=1, sort_keys=True).encode()
        if not self._target.exists(self._claim) and not self._target.is_empty():
            raise UserError(
                f"{self._target.uri} is not empty and holds no {self._purpose.result}; "
                "choose another folder, or empty it"
            )
        # If two preparations start concurrently, one gets an error.
        if not self._target.write_new(self._claim, claim):
            raise UserError(
                f"{self._target.uri} holds the unfinished {self._purpose.job} of another source or config; "
                "choose another folder, or empty it"
            )

    def put_slices(self, slices: Iterable[Listing]) -> int:
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
            log.warning("images of %d slices have changed since they were read; reading them again", num_changed)
        self._undo_second_pass()
        return len(digests)

    def begin_second_pass(self) -> None:
        """Record that shards of these slices may lack duplicates from now on."""
        self._target.write(self._second, b"")

    def listing(self, number: int) -> bytes:
        """Return a slice's listing as JSON."""
        return self._target.read(self._path("slices", number))

    def slice(self, number: int) -> Slice:
        return Slice.from_json(self.listing(number))

    def put(self, summary: Summary, *, again: bool = False) -> None:
        """Record that the slice is done: in the first pass, or in the second (`again`), which omits duplicates."""
        self._target.write(self._path("again" if again else "done", summary.number), summary.to_json())

    def summary(self, number: int, *, again: bool = False) -> SliceSummary:
        """Return the slice's summary from the first pass, or from the second (`again`)."""
        return SliceSummary.from_json(self._target.read(self._path("again" if again else "done", number)))

    def summaries(self, *, again: bool = False) -> Iterator[SliceSummary]:
        """Yield the summaries of all done slices by number; with `again`, those of the second pass where they exist."""
        yield from map(SliceSummary.from_json, self.records(again=again))

    def records(self, *, again: bool = False) -> Iterator[bytes]:
        """Yield what `summaries` yields, as JSON."""
        first, second = self.done(), self.done(again=True) if again else set()
        paths = [self._path("again" if number in second else "done", number) for number in sorted(first)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(paths), _THREADS):
                yield from pool.map(self._target.read, paths[start : start + _THREADS])

    def done(self, *, again: bool = False) -> set[int]:
        """Return the numbers of the slices that are done."""
        existing = self._names("again" if again else "done")
        return {number for number, digests in existing.items() if self._digest_of(number) in digests}

    def piece(self, number: int, piece: range) -> Storage:
        """Return the folder of a piece of a slice: its positions `piece`."""
        return open_storage(self._target.join(f"{self._pieces_of(number)}/{piece.start:06d}-{piece.stop:06d}"))

    def finish_piece(self, piece: range, summary: Summary) -> None:
        """Record that a piece is done, once its files are written."""
        self.piece(summary.number, piece).write(_PIECE_SUMMARY, summary.to_json())

    def piece_summary(self, number: int, piece: range) -> SliceSummary:
        return SliceSummary.from_json(self.piece(number, piece).read(_PIECE_SUMMARY))

    def pieces(self) -> dict[int, list[range]]:
        """Return the pieces that are done, by slice. Pieces of slices that have changed are not among them."""
        found: dict[int, list[range]] = {}
        for path, _ in self._target.walk(self._in("pieces")):
            folder, _, name = path.rpartition("/")
            if name == _PIECE_SUMMARY:
                slice_folder, _, positions = folder.rpartition("/")
                number = int(slice_folder.rpartition("/")[2].partition("-")[0])
                if slice_folder == self._pieces_of(number):
                    start, stop = map(int, positions.split("-"))
                    found.setdefault(number, []).append(range(start, stop))
        return found

    def delete_pieces(self, number: int) -> None:
        """Delete the pieces of a slice that is done."""
        self._delete([path for path, _ in self._target.walk(self._pieces_of(number))])

    def remove(self) -> None:
        """Delete the work folder and the temporary files of killed tasks; the claim goes last."""
        self._target.delete_temporaries()
        self._delete([path for path, _ in self._target.walk(self._purpose.folder) if path != self._claim])
        self._target.delete(self._claim)
        self._target.delete_empty(self._purpose.folder)

    @property
    def exists(self) -> bool:
        return self._target.exists(self._claim)

    def _replace(self, part: Listing, content: bytes, digest: str, stale: set[str]) -> None:
        """Write the slice's listing. Stale listings are deleted last, so that they are found again after a kill."""
        if stale:
            summaries = [self._named(kind, part.number, old) for old in stale for kind in ("done", "again")]
            self._delete([*summaries, *part.outputs])
        self._target.write(self._named("slices", part.number, digest), content)
        self._delete([self._named("slices", part.number, old) for old in stale])

    def _undo_second_pass(self) -> None:
        """Mark every slice as not done if a second pass over other slices has begun: it omitted other duplicates."""
        stale = [path for path, _ in self._target.walk(self._in("second")) if path != self._second]
        if stale:
            self._delete([path for kind in ("again", "done") for path, _ in self._target.walk(self._in(kind))])
            self._delete(stale)

    @property
    def _second(self) -> str:
        return f"{self._in('second')}/{_digest(self._digests.encode())}"

    def _delete(self, paths: Iterable[str]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._target.delete, paths))

    def _names(self, kind: str) -> dict[int, set[str]]:
        """Return the digests of the existing files of a kind, by slice number."""
        found: dict[int, set[str]] = {}
        for path, _ in self._target.walk(self._in(kind)):
            number, _, digest = path.rpartition("/")[2].removesuffix(".json").partition("-")
            found.setdefault(int(number), set()).add(digest)
        return found

    def _path(self, kind: str, number: int) -> str:
        return self._named(kind, number, self._digest_of(number))

    def _named(self, kind: str, number: int, digest: str) -> str:
        return f"{self._in(kind)}/{number:06d}-{digest}.json"

    def _pieces_of(self, number: int) -> str:
        return f"{self._in('pieces')}/{number:06d}-{self._digest_of(number)}"

    def _in(self, kind: str) -> str:
        return f"{self._purpose.folder}/{kind}"

    @property
    def _claim(self) -> str:
        return self._in("claim.json")

    def _digest_of(self, number: int) -> str:
        return self._digests[number * _DIGEST_CHARS : (number + 1) * _DIGEST_CHARS]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_CHARS]
