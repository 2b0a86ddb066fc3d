"""A file with a label for each image, such as labels.csv beside a folder of images."""

import csv
import io
import json
from collections.abc import Iterator, Sequence

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.candidates import URI_COLUMNS, delimiter
from pipelines.sources.entry import SPLIT_WORDS
from pipelines.sources.labels import LABEL_NAMES, class_of_text, is_likely
from pipelines.sources.masks import stem_of
from pipelines.sources.passed_over import PassedOver
from pipelines.storage import Storage, storage_of

_MAX_BYTES = 2**30


class LabelFile:
    """Labels by name of the image: its path below the source, its name, or its name without suffix."""

    def __init__(self, storage: Storage, config: SourceConfig) -> None:
        name = config.label_name
        self.path = "" if "://" in name or name.startswith(("/", "~")) else name
        place, file = (storage, self.path) if self.path and storage.exists(self.path) else storage_of(name)
        if (place.uri, file) != (storage.uri, self.path):
            self.path = ""
        self._uri = place.join(file)
        self._labels: dict[str, tuple[str, str]] = {}
        self._matched: dict[str, str] = {}
        suffix = file.rpartition(".")[2].lower()
        try:
            text = place.read(file, _MAX_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{self._uri} is not text in UTF-8; save it as CSV in UTF-8") from None
        rows = _json_rows(text, self._uri) if suffix in ("jsonl", "ndjson") else _csv_rows(text, delimiter(suffix))
        self._read(rows, config)

    def _read(self, rows: Iterator[tuple[int, dict[str, str]]], config: SourceConfig) -> None:
        image = label = split = ""
        multi = config.multi_label
        for number, row in rows:
            if not image:
                image, label, split = self._columns(list(row), config)
            key, found = (
                row.get(image, "").strip().removeprefix("./"),
                class_of_text(row.get(label) or "", multi_label=multi),
            )
            word = (row.get(split) or "").strip().lower() if split else ""
            if not key:
                raise UserError(f"line {number} of {self._uri} names no image; fix it")
            if word and word not in SPLIT_WORDS:
                raise UserError(f"line {number} of {self._uri} has split {word!r}; it must be train, val or test")
            value = found, SPLIT_WORDS.get(word, "")
            if self._labels.setdefault(key, value) != value:
                raise UserError(
                    f"{self._uri} gives {key} the label {self._labels[key][0]!r} and on line {number} {found!r}; "
                    "keep one line for each image"
                )
        if not self._labels:
            raise UserError(f"{self._uri} has no rows; give a file with columns such as image,label")

    def _columns(self, names: Sequence[str], config: SourceConfig) -> tuple[str, str, str]:
        """Return the columns of image, label and split (which may be empty)."""
        by_name = {name.strip().lower(): name for name in names}
        image = config.image_column or next((by_name[n] for n in URI_COLUMNS if n in by_name), "")
        others = [name for name in names if name != image]
        label = next((by_name[n] for n in LABEL_NAMES if n in by_name), "")
        label = label or next((name for name in others if is_likely(name)), "")
        label = label or (others[0] if len(others) == 1 else "")
        split = config.split_column or by_name.get("split", "")
        missing = [name for name in (image, label) if name not in names] or (
            [split] if split not in (*names, "") else []
        )
        if missing:
            raise UserError(
                f"{self._uri} has columns {', '.join(names)}, of which none is "
                f"{missing[0] or 'clearly image and label'}; name them image and label, or give --image-column"
            )
        return image, label, split

    def find(self, path: str) -> tuple[str, str]:
        """Return label and split of an image; both empty if the file does not name it.

        Raises UserError if another image had the same name there.
        """
        name = path.rpartition("/")[2]
        for key in (path, name, stem_of(name)):
            if key in self._labels:
                other = self._matched.setdefault(key, path)
                if other != path:
                    raise UserError(
                        f"{self._uri} names {key}, which could be {other} or {path}; give paths below the source there"
                    )
                return self._labels[key]
        return "", ""

    def report(self, passed: PassedOver) -> None:
        """Count the rows that name no image of the source. Raises UserError if all do."""
        unused = len(self._labels) - len(self._matched)
        example = next((key for key in self._labels if key not in self._matched), "")
        if not self._matched:
            raise UserError(
                f"no row of {self._uri} names an image of the source (it has {example}, for example); the image column "
                "must hold paths below the source, names, or names without suffix"
            )
        if unused:
            passed.add("rows of the label file that name no image", example, count=unused)


def _csv_rows(text: str, separator: str) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv.DictReader(io.StringIO(text), delimiter=separator)
    for row in rows:
        yield rows.line_num, row


def _json_rows(text: str, uri: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            raise UserError(f"line {number} of {uri} is not JSON; fix it") from None
        if row:
            yield number, {key: "" if value is None else str(value) for key, value in row.items()}
