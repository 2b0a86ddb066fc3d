"""A CSV or Parquet list of URIs: a column `uri` (or path, file, image), and optionally `label` and `split`."""

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.candidates import Candidates, check_header, refuse_labels
from pipelines.sources.columns import label_column
from pipelines.sources.entry import SPLIT_WORDS, Entry
from pipelines.sources.groups import group_of, refuse_absent_group
from pipelines.sources.labels import class_of, class_of_text, is_likely
from pipelines.sources.parquet import open_table
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.reading import Place
from pipelines.sources.splits import ListedSplits
from pipelines.storage import Storage

_URI_COLUMNS = ("uri", "url", "path", "file", "filename", "file_name", "image")
_LABEL_COLUMNS = ("label", "class", "target", "category")
_BATCH_ROWS = 8192
_REMEDY = "name another by --labels column:NAME, or use --labels none"


class CsvList:
    """Images that a CSV file with a header lists; relative paths are relative to its folder."""

    kind = "list of images"
    allows_missing = True

    def __init__(self, storage: Storage, path: str, config: SourceConfig, group_column: str = "") -> None:
        refuse_labels(config, "a list", ("auto", "none", "column"))
        self.place = Place(storage, takes_uris=True)
        self.classes: list[str] = []
        self.passed_over, self.candidates = PassedOver(), Candidates()
        self._storage, self._path, self._uri = storage, path, storage.join(path)
        self._by_path = ListedSplits(self._uri)
        self._multi_label = config.multi_label
        header = next(self._rows(), (0, []))[1]
        check_header(header, self._uri)
        self._columns = _columns(header, self._uri, config, group_column)
        self._width = len(header)
        self.has_explicit_labels = "label" in self._columns
        unused = [name for i, name in enumerate(header) if i not in self._columns.values() and is_likely(name)]
        _note_unused(unused, self, config)

    def entries(self) -> Iterator[Entry]:
        rows = self._rows()
        next(rows)
        for number, row in rows:
            where = f"line {number} of {self._uri}"
            if row and len(row) != self._width:
                raise UserError(f"{where} has {len(row)} fields where the header has {self._width}; fix it")
            if row:
                found = {key: row[i].strip() for key, i in self._columns.items()}
                if "split" not in found:
                    found["split"] = self._by_path.of(found["uri"])
                yield _entry(
                    self._storage,
                    where,
                    found | {"label": class_of_text(found.get("label", ""), multi_label=self._multi_label)},
                )
        self._by_path.refuse_mixed()

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the fields of each row, with the number of its last line."""
        with self._text() as text:
            try:
                rows = csv.reader(text)
                for row in rows:
                    yield rows.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{self._uri} is not a CSV file in UTF-8 ({error}); save it as UTF-8") from None

    def _text(self) -> io.TextIOWrapper:
        file = io.BufferedReader(self._storage.open_input(self._path), 2**20)
        return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


class ParquetList:
    """Images that Parquet files list in a column of strings."""

    kind = "list of images"
    allows_missing = True

    def __init__(
        self,
        storage: Storage,
        paths: Sequence[str],
        config: SourceConfig,
        passed: PassedOver,
        group_column: str = "",
    ) -> None:
        refuse_labels(config, "a list", ("auto", "none", "column"))
        self.place = Place(storage, takes_uris=True)
        self.classes: list[str] = []
        self.passed_over, self.candidates = passed, Candidates()
        self._storage, self._paths, self._multi_label = storage, paths, config.multi_label
        self._by_path = ListedSplits(storage.join(paths[0]))
        with open_table(storage, paths[0]) as file:
            names, uri = file.schema_arrow.names, _uri_column(file, config)
            label = label_column(file.schema_arrow, storage.join(paths[0]), config, uri)
            refuse_absent_group(file.schema_arrow, storage.join(paths[0]), group_column)
        split = config.split_column or ("split" if "split" in names else "")
        found = {"uri": uri, "label": label, "split": split, "bundle": group_column}
        self._columns = {key: column for key, column in found.items() if column}
        self.has_explicit_labels = bool(label)
        _note_unused([name for name in names if name not in found.values() and is_likely(name)], self, config)

    def entries(self) -> Iterator[Entry]:
        for path in self._paths:
            with open_table(self._storage, path) as file:
                missing = sorted(set(self._columns.values()) - set(file.schema_arrow.names))
                if missing:
                    raise UserError(
                        f"{self._storage.join(path)} has no column {missing[0]!r}, unlike {self._paths[0]}; "
                        "prepare files of one kind at a time"
                    )
                columns = list(self._columns.values())
                rows = (row for batch in file.iter_batches(_BATCH_ROWS, columns=columns) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    where = f"row {number} of {self._storage.join(path)}"
                    found = {k: "" if row[c] is None else str(row[c]).strip() for k, c in self._columns.items()}
                    if "split" not in found:
                        found["split"] = self._by_path.of(found["uri"])
                    if "bundle" in self._columns:
                        found["bundle"] = group_of(row[self._columns["bundle"]], where)
                    if "label" in self._columns:
                        found["label"] = class_of(
                            row[self._columns["label"]], where, _REMEDY, multi_label=self._multi_label
                        )
                    yield _entry(self._storage, where, found)
        self._by_path.refuse_mixed()


def is_list(storage: Storage, path: str, config: SourceConfig) -> bool:
    """Return whether a Parquet file lists images by name instead of containing them."""
    with open_table(storage, path) as file:
        return bool(_uri_column(file, config)) and not any(
            pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_struct(kind) for kind in file.schema_arrow.types
        )


def _note_unused(names: Sequence[str], source: "CsvList | ParquetList", config: SourceConfig) -> None:
    for name in names:
        source.candidates.add(f"column:{name}", "column of the list")
        if config.labels == "auto":
            source.passed_over.add("columns that may be labels (--labels)", name, beside=True)


def _uri_column(file: object, config: SourceConfig) -> str:
    schema = file.schema_arrow  # pyright: ignore[reportAttributeAccessIssue]
    for name in (config.image_column,) if config.image_column else _URI_COLUMNS:
        if name in schema.names and (
            pat.is_string(schema.field(name).type) or pat.is_large_string(schema.field(name).type)
        ):
            return name
    return ""


def _columns(header: Sequence[str], uri: str, config: SourceConfig, group_column: str) -> dict[str, int]:
    """Return the position of each known field in the header. Raises UserError for a column that is not there."""
    names = [name.strip().lower() for name in header]
    wanted = {
        "uri": (config.image_column,) if config.image_column else _URI_COLUMNS,
        "label": {"none": (), "column": (config.label_name,)}.get(config.label_kind, _LABEL_COLUMNS),
        "split": (config.split_column,) if config.split_column else ("split",),
        "bundle": (group_column,) if group_column else (),
    }
    asked = {"uri": config.image_column, "split": config.split_column, "bundle": group_column}
    asked["label"] = config.label_name if config.label_kind == "column" else ""
    columns = {}
    for key, known in wanted.items():
        position = next((names.index(name.lower()) for name in known if name.lower() in names), None)
        if position is not None:
            columns[key] = position
        elif asked[key]:
            raise UserError(f"the first line of {uri} has no column {asked[key]!r}, but {', '.join(header)}")
    if "uri" not in columns:
        raise UserError(
            f"the first line of {uri} names no column of images, but {', '.join(header)}; make it uri,label or "
            "path,label, or give --image-column"
        )
    return columns


def _entry(storage: Storage, where: str, row: dict[str, str]) -> Entry:
    uri, label, word = row["uri"], row.get("label", ""), row.get("split", "").lower()
    while uri.startswith("./"):
        uri = uri[2:].lstrip("/")
    split = SPLIT_WORDS.get(word, "")
    if not uri:
        raise UserError(f"{where} names no image; give its path or s3:// URI")
    if word and not split:
        raise UserError(f"{where} has split {word!r}; it must be train, val or test")
    is_local = uri.startswith(("/", "file://"))
    if "://" in uri and not uri.startswith(("s3://", "file://")):
        raise UserError(f"{where} names {uri}, which cannot be read; give paths, s3:// or file:// URIs")
    if is_local and not storage.is_local:
        raise UserError(f"{where} names {uri} on this machine, which a list in a bucket may not; use s3:// or a path")
    return Entry(name=uri, path=uri, split=split, label=label, is_flat=bool(label), bundle=row.get("bundle", ""))
