"""Which columns of a file of rows hold images, labels and splits, by their Arrow types and names.

Dots in a name lead into structs, as in `image.bytes` and `json.label`, unless a column has the whole name.
"""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.labels import LABEL_NAMES, is_likely, is_list, is_text, takes

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "image/encoded", "image_raw")


def field_of(schema: pa.Schema, path: str) -> pa.Field | None:
    """Return the column of this name, or the field of one where dots lead into structs; None if there is none."""
    if path in schema.names:
        return schema.field(path)
    top, *inner = path.split(".")
    field = schema.field(top) if top in schema.names else None
    for name in inner:
        if field is None or not pat.is_struct(field.type) or field.type.get_field_index(name) < 0:
            return None
        field = field.type.field(name)
    return field


def top_of(schema: pa.Schema, path: str) -> str:
    return path if path in schema.names else path.partition(".")[0]


def column_of(table: pa.Table, path: str) -> pa.ChunkedArray:
    if path in table.column_names:
        return table[path]
    top, *inner = path.split(".")
    return pc.struct_field(table[top], inner)  # pyright: ignore[reportAttributeAccessIssue] -- made at import


def likely_fields(field: pa.Field) -> list[str]:
    """Return the paths of the fields of a struct that may hold classes."""
    if not pat.is_struct(field.type):
        return []
    return [f"{field.name}.{inner.name}" for inner in field.type if is_likely(inner.name) and takes(inner.type)]


def label_column(schema: pa.Schema, uri: str, config: SourceConfig, image: str, *, nested: bool = False) -> str:
    """Return the name of the column with the classes; empty if there is none or none is wanted.

    Without a name that is the first of the usual names, else the only one to which the Hub's schema gives class names.
    With `nested`, dots of a name may lead into structs. Raises UserError for a column that is missing or cannot hold a
    class, with those that can.
    """
    if config.label_kind == "none":
        return ""
    others = [name for name in schema.names if name not in (image, config.image_column)]
    name = config.label_name if config.label_kind == "column" else ""
    if not name:
        usual = [known for known in LABEL_NAMES if known in others and not bytes_of(schema.field(known))]
        named = [column for column in others if names_of(schema, column)]
        name = usual[0] if usual else named[0] if len(named) == 1 else ""
    if not name:
        return ""
    multi = config.multi_label
    can = [column for column in others if takes(schema.field(column).type, multi_label=multi)]
    remedy = (
        f"name one of {', '.join(can)} by --labels column:NAME, or use --labels none" if can else "use --labels none"
    )
    field = field_of(schema, name) if nested or name in schema.names else None
    if field is None:
        raise UserError(f"{uri} has no column {name!r}; {remedy}")
    kind = field.type
    if not takes(kind, multi_label=multi):
        what = "lists" if is_list(kind) else str(kind)
        several = " unless --multi-label is given" if what == "lists" else ""
        raise UserError(f"column {name} of {uri} has {what}, but an image has one class{several}; {remedy}")
    return name


def split_column(schema: pa.Schema, config: SourceConfig, uri: str) -> str:
    """Return the column with the splits: the one that is named, or one of strings called `split`; else empty."""
    name = config.split_column
    if name and name not in schema.names:
        raise UserError(f"{uri} has no column {name!r}; its columns are {', '.join(schema.names)}")
    if name or "split" not in schema.names:
        return name
    return "split" if is_text(schema.field("split").type) else ""


def image_column(schema: pa.Schema, uri: str, config: SourceConfig) -> str:
    """Return the path of the column with the image bytes, such as `image` or `image.bytes`."""
    binary = {name: path for name in schema.names if (path := bytes_of(schema.field(name)))}
    if wanted := config.image_column:
        wanted = wanted if wanted in binary else wanted.removesuffix(".bytes")
        if wanted not in binary:
            raise UserError(
                f"{uri} has no column {wanted!r} of images; those of type binary or struct<bytes, path> are "
                f"{', '.join(binary) or 'none'}"
            )
        return binary[wanted]
    named = [path for name, path in binary.items() if name in _IMAGE_COLUMNS]
    if len(named or binary) != 1:
        raise UserError(
            f"{uri} has no unambiguous column of images (columns: {', '.join(schema.names)}{_shown_type(schema)}); "
            "name one `image`, of type binary or struct<bytes, path>, or choose it by --image-column"
        )
    return named[0] if named else next(iter(binary.values()))


def _shown_type(schema: pa.Schema) -> str:
    """Say of which type the column is that has the name of one of images."""
    name = next((name for name in _IMAGE_COLUMNS if name in schema.names), "")
    return f", where {name} is of type {str(schema.field(name).type)[:80]}" if name else ""


def bytes_of(field: pa.Field) -> str:
    if is_bytes(field.type):
        return field.name
    if pat.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        return f"{field.name}.bytes" if is_bytes(field.type.field("bytes").type) else ""
    return ""


def is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return pat.is_binary(kind) or pat.is_large_binary(kind) or kind == pa.binary_view()


def names_of(schema: pa.Schema, column: str) -> list[str]:
    """Return the class names that Hugging Face's datasets stores in the schema, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        names = feature.get("feature", feature)["names"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
