"""A file with a label for each image, such as labels.csv beside a folder of images."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.candidates import URI_COLUMNS, check_header, delimiter
from pipelines.sources.entry import SPLIT_WORDS
from pipelines.sources.labels import LABEL_NAMES, class_of_cell, is_likely
from pipelines.sources.masks import stem_of
from pipelines.sources.passed_over import PassedOver
from pipelines.storage import Storage, storage_of

_MAX_BYTES = 2**30
_NO_TABLES = ("json", "parquet", "xls", "xlsx")
_EXAMPLE = '{"image": "1.jpg", "label": "cat"}'


class LabelFile:
    """Labels by name of the image: its path below the source, its name, or its name without suffix.

    A file in the folder of a split names images of this split. A name such as metadata.csv without a folder means one
    in each such folder, as the Hub's `imagefolder` has them, if there is none at the top.
    """

    def __init__(self, storage: Storage, config: SourceConfig) -> None:
        self._labels: dict[str, tuple[str, str]] = {}
        self._matched: dict[str, str] = {}
        self._folders: set[str] = set()
        name = config.label_name
        is_inside = "://" not in name and not name.startswith(("/", "~"))
        inside = [name] if is_inside and storage.exists(name) else []
        if is_inside and "/" not in name and not inside:
            tops = [cased for word in SPLIT_WORDS for cased in (word, word.title(), word.upper())]
            inside = [path for top in tops if storage.exists(path := f"{top}/{name}")]
        places = [(storage, path) for path in inside] or [storage_of(name)]
        self._uri = places[0][0].join(places[0][1])
        for place, file in places:
            self._uri = place.join(file)
            if not place.exists(file):
                raise UserError(f"there is no {name} in {storage.uri}, and no {self._uri}; check the path")
            top = file.rpartition("/")[0] if inside else ""
            folder = f"{top}/" if top.lower() in SPLIT_WORDS else ""
            self._folders.add(folder)
            self._read(_rows_of(place, file), config, folder)

    def _read(self, rows: Iterator[tuple[int, dict[str, Any]]], config: SourceConfig, folder: str) -> None:
        """Read a file that names images in a folder of the source, which ends in a slash, or anywhere."""
        image = label = split = ""
        multi, number = config.multi_label, 0
        for number, row in rows:
            if not image:
                image, label, split = self._columns(list(row), config)
            where = f"line {number} of {self._uri}"
            key = "" if row.get(image) is None else str(row[image]).strip().removeprefix("./")
            found = class_of_cell(row.get(label), where, "name another column, or leave it empty", multi_label=multi)
            word = str(row.get(split) or "").strip().lower() if split else ""
            if not key:
                raise UserError(f"{where} names no image; fix it")
            if word and word not in SPLIT_WORDS:
                raise UserError(f"{where} has split {word!r}; it must be train, val or test")
            key, value = f"{folder}{key.removeprefix(folder)}", (found, SPLIT_WORDS.get(word, ""))
            if self._labels.setdefault(key, value) != value:
                raise UserError(
                    f"{self._uri} gives {key} the label {self._labels[key][0]!r} and on line {number} {found!r}; "
                    "keep one line for each image"
                )
        if not number:
            raise UserError(f"{self._uri} has no rows; give a file with columns such as image,label")

    def _columns(self, names: Sequence[str], config: SourceConfig) -> tuple[str, str, str]:
        """Return the columns of image, label and split (which may be empty)."""
        by_name = {name.strip().lower(): name for name in names}
        image = config.image_column or next((by_name[n] for n in URI_COLUMNS if n in by_name), "")
        others = [name for name in names if name != image]
        label = config.label_column or next((by_name[n] for n in LABEL_NAMES if n in by_name), "")
        likely = [name for name in others if is_likely(name)]
        if not label and len(likely) > 1:
            raise UserError(
                f"{self._uri} has the columns {', '.join(likely)}, of which each may be the label; name one, as in "
                f"--labels file:{config.label_name}:{likely[0]}"
            )
        label = label or next(iter(likely), "")
        label = label or (others[0] if len(others) == 1 else "")
        split = config.split_column or by_name.get("split", "")
        missing = [name for name in (image, label) if name not in names] or (
            [split] if split not in (*names, "") else []
        )
        if missing:
            raise UserError(
                f"{self._uri} has columns {', '.join(names)}, of which none is "
                f"{missing[0] or 'clearly image and label'}; name them image and label, or give --image-column and "
                f"--labels file:{config.label_name}:COLUMN"
            )
        return image, label, split

    def find(self, path: str) -> tuple[str, str]:
        """Return label and split of an image; both empty if the file does not name it.

        Raises UserError if another image had the same name there.
        """
        name, top = path.rpartition("/")[2], path.partition("/")[0] + "/"
        in_split = (top + name, top + stem_of(name)) if top in self._folders else ()
        for key in (path, stem_of(path), *in_split, name, stem_of(name)):
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


def _rows_of(place: Storage, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the rows of a table, each with the number of its line."""
    uri, suffix = place.join(file), file.rpartition(".")[2].lower()
    if suffix in _NO_TABLES:
        raise UserError(f"{uri} is no table that is read; save it as CSV, TSV or JSON lines (.jsonl)")
    try:
        text = place.read(file, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{uri} is not text in UTF-8; save it as CSV in UTF-8") from None
    return _json_rows(text, uri) if suffix in ("jsonl", "ndjson") else _csv_rows(text, suffix, uri)


def _csv_rows(text: str, suffix: str, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(suffix))
    try:
        header = next(rows, [])
        check_header(header, uri)
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"line {rows.line_num} of {uri} has {len(row)} fields where the header has {len(header)}; fix it"
                )
            if row:
                yield rows.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f"line {rows.line_num} of {uri} is not CSV ({error}); fix it") from None


def _json_rows(text: str, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            raise UserError(f"line {number} of {uri} is not JSON; fix it") from None
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {uri} is no JSON object, such as {_EXAMPLE}; fix it")
        if row:
            yield number, row
