"""Files of rows with a column of encoded images: binary, or Hugging Face's struct<bytes, path>.

Only binary, integer and string columns are read, by their Arrow types; nothing is ever unpickled.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.candidates import Candidates, refuse_labels
from pipelines.sources.columns import (
    bytes_of,
    column_of,
    field_of,
    image_column,
    is_bytes,
    label_column,
    likely_fields,
    names_of,
    split_column,
    top_of,
)
from pipelines.sources.content import HEAD_BYTES, is_image
from pipelines.sources.entry import SPLIT_WORDS, Entry
from pipelines.sources.groups import group_of, refuse_absent_group
from pipelines.sources.labels import LABEL_NAMES, classes_of_column, is_likely, is_text, takes
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.reading import Place
from pipelines.sources.rows import PARQUET, open_rows
from pipelines.sources.splits import refuse_partitions, splits_by_name
from pipelines.sources.table_files import TableFile
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile

_INDEX_THREADS = 4
_REMEDY = "name another by --labels column:NAME, or use --labels none"


class Tables:
    """Images in files of rows. A file whose name ends in a split but for its number belongs to it."""

    allows_missing = True

    def __init__(
        self,
        storage: Storage,
        files: Sequence[ListedFile],
        config: SourceConfig,
        passed: PassedOver,
        group_column: str = "",
        kind_of_rows: str = PARQUET,
    ) -> None:
        self.kind = f"{kind_of_rows} with images"
        refuse_labels(config, self.kind, ("auto", "none", "column"))
        self._storage, self._files, self._group_column = storage, files, group_column
        self._multi_label = config.multi_label
        uri = storage.join(files[0].path)
        with open_rows(kind_of_rows, storage, files[0].path, files[0].version) as file:
            schema = file.schema
        self.passed_over, self.candidates = passed, Candidates()
        self.place = Place(storage, image_column=image_column(schema, uri, config), kind_of_rows=kind_of_rows)
        self._image_top = top_of(schema, self.place.image_column)
        self._label_column = label_column(schema, uri, config, self._image_top, nested=True)
        label = field_of(schema, self._label_column)
        self._label_is_text = label is not None and is_text(label.type)
        self.classes = names_of(schema, self._label_column)
        self.has_explicit_labels = bool(self._label_column)
        self._split_column = split_column(schema, config, uri)
        refuse_absent_group(schema, uri, group_column)
        paths = [found.path for found in files]
        refuse_partitions(paths, storage.uri, schema.names, config)
        self._splits = splits_by_name(paths, storage.uri)
        used = {self._image_top, top_of(schema, self._label_column), self._split_column, group_column}
        self._note_unused(schema, used, config)
        self._config = config

    def _note_unused(self, schema: pa.Schema, used: set[str], config: SourceConfig) -> None:
        """Note columns that may hold labels or other images."""
        for name in schema.names:
            if name in used:
                continue
            if names_of(schema, name):
                self.candidates.add(f"column:{name}", f"{len(names_of(schema, name))} class names")
            elif takes(schema.field(name).type) and (is_likely(name) or pat.is_dictionary(schema.field(name).type)):
                self.candidates.add(f"column:{name}", str(schema.field(name).type))
            elif bytes_of(schema.field(name)):
                self.passed_over.add("columns of images that are not taken (--image-column)", name, beside=True)
                continue
            elif inner := likely_fields(schema.field(name)):
                for path in inner:
                    self.candidates.add(f"column:{path}", "field of a column")
            else:
                continue
            if config.labels == "auto":
                self.passed_over.add("columns that may be labels (--labels)", name, beside=True)

    def entries(self) -> Iterator[Entry]:
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            for start in range(0, len(self._files), _INDEX_THREADS):
                for entries, passed in pool.map(self._index, self._files[start : start + _INDEX_THREADS]):
                    self.passed_over.merge(passed)
                    yield from entries

    def _index(self, found: ListedFile) -> tuple[list[Entry], PassedOver]:
        path = found.path
        with open_rows(self.place.kind_of_rows, self._storage, path, found.version) as file:
            schema = file.schema
            missing = [column for column in (self._image_top, *self._columns) if not field_of(schema, column)]
            if missing:
                raise UserError(
                    f"{self._storage.join(path)} has no column {missing[0]!r}, unlike {self._files[0].path}; "
                    "prepare files of one kind at a time"
                )
            self._refuse_other_labels(file, path)
            return self._entries(file, found), file.passed_over

    def _refuse_other_labels(self, file: TableFile, path: str) -> None:
        """Raise UserError if the labels of a file mean something else than those of the first, or only it has some."""
        schema, uri, first = file.schema, self._storage.join(path), self._files[0].path
        if not self._label_column:
            if (found := label_column(schema, uri, self._config, self._image_top)) and path != first:
                raise UserError(
                    f"{uri} has labels in its column {found}, and {first} has no such column; prepare them one at a "
                    f"time, add the column there (null where a label is missing), or use --labels none"
                )
            if path == first:
                self._refuse_bytes_as_labels(file, uri)
        elif names_of(schema, self._label_column) != self.classes:
            raise UserError(
                f"{uri} has other class names than {first}, so that the same number means two classes; prepare them "
                "one at a time"
            )
        elif (field := field_of(schema, self._label_column)) and is_text(field.type) != self._label_is_text:
            raise UserError(
                f"column {self._label_column} of {uri} is of type {field.type}, and that of {first} is not, so that a "
                "class would have a name in one and a number in the other; make them alike, or use --labels none"
            )

    def _refuse_bytes_as_labels(self, file: TableFile, uri: str) -> None:
        """Raise UserError for a column of binary by the name of labels, if it holds texts instead of images."""
        for name in (known for known in LABEL_NAMES if known in file.schema.names and self._config.labels == "auto"):
            if name == self._image_top or not is_bytes(file.schema.field(name).type) or not file.num_groups:
                continue
            first = file.rows(0, self.place.image_column)[0][:1]
            for content in file.contents(0, first, name) if first else ():
                if isinstance(content, bytes) and not is_image(content[:HEAD_BYTES]):
                    raise UserError(
                        f"column {name} of {uri} is of type {file.schema.field(name).type} and holds no images: if it "
                        "has classes, cast it to string; else name the labels by --labels column:NAME, or use --labels "
                        "none"
                    )

    @property
    def _columns(self) -> list[str]:
        """Columns that are read beside the images."""
        return list(dict.fromkeys(c for c in (self._label_column, self._split_column, self._group_column) if c))

    def _entries(self, file: TableFile, found: ListedFile) -> list[Entry]:
        """Return the entries of a file, named by their number in it."""
        entries: list[Entry] = []
        for group in range(file.num_groups):
            rows, num_bytes = file.rows(group, self.place.image_column)
            labels, splits, bundles = self._of_rows(file, found.path, group, len(rows))
            for row, label, split, bundle in zip(rows, labels, splits, bundles):
                name, is_flat = f"{found.path}/{len(entries):09d}", bool(label)
                entries.append(
                    Entry(
                        name, found.path, -1, group, row, num_bytes, split, label, is_flat, found.version, bundle=bundle
                    )
                )
        return entries

    def _of_rows(self, file: TableFile, path: str, group: int, num_rows: int) -> tuple[list[str], list[str], list[str]]:
        """Return label, split and bundle of each row of a group."""
        labels = bundles = [""] * num_rows
        splits = [self._splits.get(path, "")] * num_rows
        if self._columns:
            table = file.read(group, [top_of(file.schema, column) for column in self._columns])
            uri = self._storage.join(path)
            if self._label_column:
                labels = classes_of_column(
                    column_of(table, self._label_column), self.classes, uri, _REMEDY, multi_label=self._multi_label
                )
            if self._split_column:
                splits = [self._split(value, path) for value in table[self._split_column].to_pylist()]
            if self._group_column:
                where = f"column {self._group_column} of {uri}"
                bundles = [group_of(value, where) for value in table[self._group_column].to_pylist()]
        return labels, splits, bundles

    def _split(self, value: object, path: str) -> str:
        split = SPLIT_WORDS.get(str(value).strip().lower(), "")
        if not split:
            raise UserError(
                f"column {self._split_column} of {self._storage.join(path)} has {value!r}, which is no split; it must "
                "be train, val or test: name another by --split-column"
            )
        by_name = self._splits.get(path, split)
        if by_name != split:
            raise UserError(
                f"{self._storage.join(path)} is of split {by_name} by its name, and its column {self._split_column} "
                f"has {value!r}; rename the file or the column"
            )
        return split
