"""Labels that a source may hold and that are not used, each by the option that would use it."""

import csv
import io
from collections.abc import Sequence

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.entry import SPLIT_WORDS
from pipelines.sources.labels import LABEL_MEMBERS, is_likely, label_keys
from pipelines.sources.passed_over import printable

_MAX_CANDIDATES = 20
_MAX_LOOKS = 4
URI_COLUMNS = (
    "uri",
    "url",
    "path",
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "image_id",
    "img",
    "id",
    "name",
)


class Candidates:
    """Options such as `column:fine_label`, each with what it names."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._looks = 0

    def add(self, option: str, what: str) -> None:
        if len(self.found) < _MAX_CANDIDATES and option.isprintable():
            self.found.setdefault(option, printable(what))

    def merge(self, other: "Candidates") -> None:
        for option, what in other.found.items():
            self.add(option, what)

    def wants(self, suffix: str) -> bool:
        """Return whether the content of another file with this suffix, without its dot, should be looked at."""
        return suffix in ("json", "csv", "tsv") and self._looks < _MAX_LOOKS

    def look(self, name: str, suffix: str, content: bytes) -> bool:
        """Look for labels in the content of a small file, or in the start of a table; return whether there are any."""
        self._looks += 1
        if suffix == "json":
            keys = label_keys(content)
            for key in keys:
                self.add(f"json:{key}", f"key of {name} and others")
            return bool(keys)
        header = next(csv.reader(io.StringIO(content.decode(errors="replace")), delimiter=delimiter(suffix)), [])
        if not any(is_likely(column) for column in header):
            return False
        top, _, below = name.partition("/")
        # One of each split is named without the folder.
        file = below if top.lower() in SPLIT_WORDS else name
        self.add(f"file:{file}", f"table with columns {', '.join(header[:8])}")
        return True

    def note_member(self, suffix: str, name: str) -> None:
        """Note a file beside an image whose suffix is that of labels."""
        if suffix.lower() in LABEL_MEMBERS:
            self.add(f"member:{suffix.lower()}", f"text of {name} and others")

    @property
    def advice(self) -> str:
        """Say how to name the labels; empty if there are none."""
        shown = [f"--labels {option} ({what})" for option, what in list(self.found.items())[:3]]
        return "labels that may be meant: " + ", ".join(shown) if shown else ""

    def none_by(self, labels: str, uri: str) -> UserError:
        """Return the error for labels that no image has, with those that may be meant."""
        others = f"; {self.advice}" if self.found else "; check the name, or use --labels none"
        return UserError(f"no image of {uri} has a label by --labels {labels}{others}")


def delimiter(suffix: str) -> str:
    """Return what separates the fields of a text table with this suffix."""
    return "\t" if suffix == "tsv" else ","


def refuse_labels(config: SourceConfig, kind: str, allowed: Sequence[str]) -> None:
    """Raise UserError if `labels` names what a source of this kind cannot have."""
    if config.label_kind not in allowed:
        shown = [f"{name}:..." if name in ("column", "json", "member", "file") else name for name in allowed]
        raise UserError(f"labels {config.labels} is not for {kind}; use one of {', '.join(shown)}")


def check_header(header: Sequence[str], uri: str) -> None:
    """Raise UserError if the first line of a text table is not of unique names, separated as its suffix says."""
    names = [name.strip().lower() for name in header]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UserError(f"the first line of {uri} has the column {twice!r} twice; rename one")
    other = next((mark for mark in ";\t," if len(header) == 1 and mark in header[0]), "")
    if other:
        raise UserError(
            f"the fields of {uri} are separated by {other!r}; separate them by commas in a .csv, and by tabs in a .tsv"
        )
