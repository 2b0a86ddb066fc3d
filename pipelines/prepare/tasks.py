"""The tasks of a preparation: write a slice or a piece of one, join pieces, drop duplicates."""

from dataclasses import dataclass
from typing import Any

from mae_core.errors import UserError
from pipelines.config import PrepareConfig
from pipelines.prepare.dropping import drop_rows
from pipelines.prepare.kinds import PLAIN, PixelKind
from pipelines.prepare.pieces import join_pieces, part_of
from pipelines.prepare.shards import write_slice
from pipelines.prepare.workfolder import WorkFolder
from pipelines.sources import Place
from pipelines.storage import Storage
from pipelines.storage.retries import StoreUnavailableError


@dataclass(frozen=True, kw_only=True)
class SliceTasks:
    """The tasks of a preparation, each of which records what it has done and returns counts."""

    work: WorkFolder
    target: Storage
    place: Place
    config: PrepareConfig
    kind: PixelKind = PLAIN

    def write(self, row: dict[str, Any]) -> dict[str, int]:
        """Write a slice, or the piece of it from position `start` to `stop` unless that is 0."""
        number, piece = int(row["number"]), range(int(row["start"]), int(row["stop"]))
        part = self.work.slice(number)
        if not piece:
            summary = write_slice(part, self.place, self.target, self.config, kind=self.kind)
            self.work.put(summary)
            return {"number": number, "num_bad": summary.num_bad}
        folder = self.work.piece(number, piece)
        self.work.finish_piece(piece, write_slice(part_of(part, piece), self.place, folder, self.config))
        # Bad images count when the pieces are joined: before, they are not in the dataset's quarantine.
        return {"number": number, "num_bad": 0}

    def join(self, row: dict[str, Any]) -> dict[str, int]:
        """Join the pieces that begin at positions `starts`, and delete them."""
        number = int(row["number"])
        part = self.work.slice(number)
        stops = [*map(int, row["starts"][1:]), len(part.entries)]
        pieces = [range(int(start), stop) for start, stop in zip(row["starts"], stops)]
        summary = join_pieces(part, pieces, self.work, self.target, self.config)
        self.work.put(summary)
        self.work.delete_pieces(number)
        return {"number": number, "num_bad": summary.num_bad}

    def drop(self, row: dict[str, Any]) -> dict[str, int]:
        """Rewrite a slice without the duplicates at positions `skip`."""
        number, skip = int(row["number"]), frozenset(map(int, row["skip"]))
        first = self.work.summary(number)
        summary = drop_rows(self.work.slice(number), skip, first, self.place, self.target, self.config, self.kind)
        self.work.put(summary, again=True)
        return {"number": number, "num_bad": 0}


def unwrapped(error: BaseException) -> BaseException:
    """Unwrap Ray's error to the storage's own error, if there is one."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) in (OSError, StoreUnavailableError, PermissionError, FileNotFoundError, UserError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
