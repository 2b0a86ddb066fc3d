"""Files of rows with a column of encoded images: binary, or Hugging Face's struct<bytes, path>.

Only binary, integer and string columns are read, by their Arrow types; nothing is ever unpickled.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.candidates import Candidates, refuse_labels
from pipelines.sources.entry import SPLIT_WORDS, Entry
from pipelines.sources.labels import LABEL_NAMES, classes_of_column, is_likely, is_list, takes
from pipelines.sources.passed_over import PassedOver
from pipelines.sources.reading import Place
from pipelines.sources.rows import PARQUET, open_rows
from pipelines.sources.splits import splits_by_name
from pipelines.sources.table_files import TableFile
from pipelines.storage import Storage
from pipelines.storage.listing import ListedFile

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "image/encoded", "image_raw")
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
        self.place = Place(storage, image_column=_image_column(schema, uri, config), kind_of_rows=kind_of_rows)
        self._label_column = label_column(schema, uri, config, self.place.image_column.split(".")[0])
        self.classes = _names(schema, self._label_column)
        self.has_explicit_labels = bool(self._label_column)
        self._split_column = _split_column(schema, config, uri)
        self._splits = splits_by_name((found.path for found in files), storage.uri)
        used = {self.place.image_column.split(".")[0], self._label_column, self._split_column, group_column}
        self._note_unused(schema, used, config)

    def _note_unused(self, schema: pa.Schema, used: set[str], config: SourceConfig) -> None:
        """Note columns that may hold labels or other images."""
        for name in schema.names:
            if name in used:
                continue
            if _names(schema, name):
                self.candidates.add(f"column:{name}", f"{len(_names(schema, name))} class names")
            elif takes(schema.field(name).type) and (is_likely(name) or pat.is_dictionary(schema.field(name).type)):
                self.candidates.add(f"column:{name}", str(schema.field(name).type))
            elif _bytes_of(schema.field(name)):
                self.passed_over.add("columns of images that are not taken (--image-column)", name, beside=True)
                continue
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
            top = [self.place.image_column.split(".")[0], *self._columns]
            missing = [column for column in top if column not in schema.names]
            if missing:
                raise UserError(
                    f"{self._storage.join(path)} has no column {missing[0]!r}, unlike {self._files[0].path}; "
                    "prepare files of one kind at a time"
                )
            if self._label_column and _names(schema, self._label_column) != self.classes:
                raise UserError(
                    f"{self._storage.join(path)} has other class names than {self._files[0].path}, so that the same "
                    "number means two classes; prepare them one at a time"
                )
            return self._entries(file, found), file.passed_over

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
            table = file.read(group, self._columns)
            uri = self._storage.join(path)
            if self._label_column:
                labels = classes_of_column(
                    table[self._label_column], self.classes, uri, _REMEDY, multi_label=self._multi_label
                )
            if self._split_column:
                splits = [self._split(value, path) for value in table[self._split_column].to_pylist()]
            if self._group_column:
                bundles = ["" if value is None else str(value) for value in table[self._group_column].to_pylist()]
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


def label_column(schema: pa.Schema, uri: str, config: SourceConfig, image: str) -> str:
    """Return the name of the column with the classes; empty if there is none or none is wanted.

    Without a name that is the first of the usual names, else the only one to which the Hub's schema gives class names.
    Raises UserError for a column that is missing or cannot hold a class, with those that can.
    """
    if config.label_kind == "none":
        return ""
    others = [name for name in schema.names if name not in (image, config.image_column)]
    name = config.label_name if config.label_kind == "column" else ""
    if not name:
        usual = [known for known in LABEL_NAMES if known in others and not _bytes_of(schema.field(known))]
        named = [column for column in others if _names(schema, column)]
        name = usual[0] if usual else named[0] if len(named) == 1 else ""
    if not name:
        return ""
    multi = config.multi_label
    can = [column for column in others if takes(schema.field(column).type, multi_label=multi)]
    remedy = (
        f"name one of {', '.join(can)} by --labels column:NAME, or use --labels none" if can else "use --labels none"
    )
    if name not in schema.names:
        raise UserError(f"{uri} has no column {name!r}; {remedy}")
    kind = schema.field(name).type
    if not takes(kind, multi_label=multi):
        what = "lists" if is_list(kind) else str(kind)
        several = " unless --multi-label is given" if what == "lists" else ""
        raise UserError(f"column {name} of {uri} has {what}, but an image has one class{several}; {remedy}")
    return name


def _split_column(schema: pa.Schema, config: SourceConfig, uri: str) -> str:
    """Return the column with the splits: the one that is named, or one of strings called `split`; else empty."""
    name = config.split_column
    if name and name not in schema.names:
        raise UserError(f"{uri} has no column {name!r}; its columns are {', '.join(schema.names)}")
    if name or "split" not in schema.names:
        return name
    kind = schema.field("split").type
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return "split" if pat.is_string(kind) or pat.is_large_string(kind) else ""


def _image_column(schema: pa.Schema, uri: str, config: SourceConfig) -> str:
    """Return the path of the column with the image bytes, such as `image` or `image.bytes`."""
    binary = {name: path for name in schema.names if (path := _bytes_of(schema.field(name)))}
    if wanted := config.image_column.removesuffix(".bytes"):
        if wanted not in binary:
            raise UserError(
                f"{uri} has no column {wanted!r} of images; those of type binary or struct<bytes, path> are "
                f"{', '.join(binary) or 'none'}"
            )
        return binary[wanted]
    named = [path for name, path in binary.items() if name in _IMAGE_COLUMNS]
    if len(named or binary) != 1:
        raise UserError(
            f"{uri} has no unambiguous column of images (columns: {', '.join(schema.names)}); "
            "name one `image`, of type binary or struct<bytes, path>, or choose it by --image-column"
        )
    return named[0] if named else next(iter(binary.values()))


def _bytes_of(field: pa.Field) -> str:
    if pat.is_binary(field.type) or pat.is_large_binary(field.type):
        return field.name
    if pat.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        inner = field.type.field("bytes").type
        return f"{field.name}.bytes" if pat.is_binary(inner) or pat.is_large_binary(inner) else ""
    return ""


def _names(schema: pa.Schema, column: str) -> list[str]:
    """Return the class names that Hugging Face's datasets stores in the schema, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        names = feature.get("feature", feature)["names"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
