"""Names of images that a preparation leaves out, read from files with one name a line."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mae_core.errors import UserError
from pipelines.prepare.shards import text_of
from pipelines.sources import Entry
from pipelines.storage import storage_of

log = logging.getLogger(__name__)

_MAX_BYTES = 2**30
_NUM_SHOWN = 3


class Exclusions:
    """Exact names to leave out, and which of them the source has."""

    def __init__(self, names: Iterable[str], files: Sequence[str]) -> None:
        self._names, self._files = frozenset(names), files
        self._matched: set[str] = set()
        self._num_excluded = 0

    @classmethod
    def read(cls, files: Sequence[str]) -> "Exclusions":
        """Read the names in the files. Raises FileNotFoundError, or UserError if a file is not UTF-8."""
        names: set[str] = set()
        for file in files:
            storage, name = storage_of(file)
            try:
                lines = storage.read(name, _MAX_BYTES).decode().split("\n")
            except UnicodeDecodeError:
                raise UserError(f"{file} is not text in UTF-8; give a file with one name a line") from None
            names.update(line.removesuffix("\r") for line in lines)
        return cls(names - {""}, files)

    @property
    def identity(self) -> dict[str, Any]:
        """What enters the dataset's identity: the number of images left out and a digest of all names.

        Empty without files, so that datasets of earlier versions keep their identity.
        """
        if not self._files:
            return {}
        digest = hashlib.sha256("\n".join(sorted(self._names)).encode()).hexdigest()
        return {"exclude": {"sha256": digest, "num_names": len(self._names), "num_excluded": self._num_excluded}}

    def applied(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries whose names are not excluded, and count the others."""
        for entry in entries:
            name = text_of(entry.name)
            if name in self._names:
                self._matched.add(name)
                self._num_excluded += 1
            else:
                yield entry

    def check(self, num_kept: int, source: str) -> None:
        """Log what was left out and which names match nothing. Raises UserError if no image remains."""
        if not self._files:
            return
        files = " ".join(self._files)
        log.info("%d images of %s are left out by --exclude %s", self._num_excluded, source, files)
        if missing := sorted(self._names - self._matched):
            shown = ", ".join(missing[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
            log.warning(
                "%d of %d names in %s match no image of %s: %s", len(missing), len(self._names), files, source, shown
            )
        if not num_kept and self._num_excluded:
            raise UserError(
                f"--exclude {files} names all {self._num_excluded} images of {source}; shorten or omit the list"
            )
