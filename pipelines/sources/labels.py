"""Labels as sources store them, as class names: text, JSON values, and Arrow columns. Nothing is ever unpickled."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from mae_core.errors import UserError

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category", "image/class/label")
"""Columns and keys that are taken for the label without being named, in this order."""
LABEL_MEMBERS = ("cls", "cls.txt", "label", "class")
"""Members beside an image that are taken for its label without being named, in this order."""
UNLABELLED_NUMBER = "-1"
_LIKELY = re.compile(
    r"(?:^|[_\-. /])(?:labels?|class(?:es)?|cls|targets?|categor(?:y|ies)|species|diagnosis|dx|breed|y)"
    r"(?:$|[_\-. /0-9])"
)
_COUNTING = re.compile(r"0|[1-9][0-9]{0,17}")
_WHOLE = re.compile(r"(-?\d+)\.0*")
_MAX_LABEL_BYTES = 1024
# Between the classes of a set, and before the first; an empty set is an image that has none of the classes.
_SEPARATOR = "\x1f"


def class_of(value: Any, where: str, remedy: str, *, multi_label: bool = False) -> str:
    """Return the name of the class that a value means; empty for a missing one.

    Whole numbers of any type are integers. With `multi_label`, a list is a set of classes. Raises UserError for any
    other list, a fraction, or another type.
    """
    if multi_label and isinstance(value, list):
        return set_of(class_of(element, where, remedy) for element in value)
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return class_of_text(value, multi_label=True) if multi_label else value.strip()
    if isinstance(value, bool | int):
        return set_of([str(value)]) if multi_label else str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return set_of([str(int(value))]) if multi_label else str(int(value))
    if isinstance(value, float | Decimal):
        raise UserError(f"{where} has label {value}, but a class is a name or a whole number; {remedy}")
    what = "a list" if isinstance(value, list) else f"of type {type(value).__name__}"
    several = " unless --multi-label is given" if isinstance(value, list) else ""
    raise UserError(f"{where} has a label that is {what}, but an image has one class{several}; {remedy}")


def set_of(names: Iterable[str]) -> str:
    """Return a label that means several classes, or none; see `members`."""
    return _SEPARATOR + _SEPARATOR.join(sorted({name for name in names if name}))


def members(label: str) -> list[str]:
    """Return the classes that a label means: itself, or those of a set."""
    return [name for name in label.split(_SEPARATOR) if name]


def class_of_text(text: str, *, multi_label: bool = False) -> str:
    """Return the class that a text names, in which pandas may have written an integer as 3.0; empty for a missing one.

    With `multi_label`, names are separated by | or ;.
    """
    found = text.strip()
    if not found or found.lower() in ("nan", "null", "<na>"):
        return ""
    if multi_label:
        return set_of(class_of_text(name) for name in re.split(r"[|;]", found))
    whole = _WHOLE.fullmatch(found)
    return whole[1] if whole else found


def class_of_cell(value: Any, where: str, remedy: str, *, multi_label: bool = False) -> str:
    """Return the class that a cell of a text table or a JSON value means; empty for a missing one."""
    if isinstance(value, str):
        return class_of_text(value, multi_label=multi_label)
    return class_of(value, where, remedy, multi_label=multi_label)


def class_of_member(content: bytes, where: str, *, multi_label: bool = False) -> str:
    """Return the class in a small text file. Raises UserError if it is none."""
    try:
        text = content.decode("utf-8-sig") if len(content) <= _MAX_LABEL_BYTES else ""
    except UnicodeDecodeError:
        text = ""
    label = class_of_text(text, multi_label=multi_label)
    if not label or "\n" in label:
        raise UserError(
            f"{where} contains no class; it must be a number or a name in UTF-8, on one line, or use --labels none"
        )
    return label


def class_in_json(content: bytes, key: str, where: str, *, multi_label: bool = False) -> str:
    """Return the class under a key, which dots may lead into; empty if it is missing. Raises UserError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON; copy it again, or choose other --labels") from None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    remedy = "name another key by --labels json:KEY, or use --labels none"
    return class_of(value, f"key {key} of {where}", remedy, multi_label=multi_label)


def label_keys(content: bytes) -> list[str]:
    """Return the keys of a JSON object that may hold a class."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return []
    scalars = [k for k, v in values.items() if isinstance(v, str | int | float)] if isinstance(values, dict) else []
    return [key for key in scalars if is_likely(key)]


def is_likely(name: str) -> bool:
    """Return whether a column or key has the name of a label, such as fine_label."""
    return _LIKELY.search(name.lower()) is not None


def takes(kind: pa.DataType, *, multi_label: bool = False) -> bool:
    """Return whether a column of this type can hold classes, if its values are whole."""
    if pat.is_dictionary(kind):
        return takes(kind.value_type)
    if is_list(kind):
        return multi_label and takes(kind.value_type)
    return (
        pat.is_integer(kind)
        or pat.is_floating(kind)
        or pat.is_decimal(kind)
        or pat.is_boolean(kind)
        or pat.is_null(kind)
        or pat.is_string(kind)
        or pat.is_large_string(kind)
        or kind == pa.string_view()
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether the values of a column are lists."""
    return pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind)


def classes_of_column(
    column: pa.ChunkedArray, names: Sequence[str], where: str, remedy: str, *, multi_label: bool = False
) -> list[str]:
    """Return the class of each row; empty for a missing one.

    With the `names` that the Hub's schema has, integers are positions in them, and -1 is missing. Raises UserError for
    what is no class.
    """
    found, is_named = [], is_text(column.type)
    for value in column.to_pylist():
        label = class_of(value, where, remedy, multi_label=multi_label)
        if names and label:
            named = [_checked(one, names, where) if is_named else _named(int(one), names, where)
                     for one in members(label)]  # fmt: skip
            label = set_of(named) if multi_label else named[0]
        found.append(label)
    return found


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column, or the elements of its lists, are strings rather than numbers."""
    if is_list(kind) or pat.is_dictionary(kind):
        return is_text(kind.value_type)
    return pat.is_string(kind) or pat.is_large_string(kind) or kind == pa.string_view()


def _named(number: int, names: Sequence[str], where: str) -> str:
    if not -1 <= number < len(names):
        raise UserError(f"{where} has label {number}, but {len(names)} class names; fix its schema")
    return "" if number < 0 else names[number]


def _checked(name: str, names: Sequence[str], where: str) -> str:
    if name not in names:
        raise UserError(
            f"{where} has label {name!r}, which is none of the {len(names)} class names of its schema; fix its schema"
        )
    return name


def numbers_or_names(labels: set[str], max_numbers: int) -> list[str]:
    """Return the classes in order: names sorted; if all are numbers, every number from 0, so that none changes.

    -1 is no class, unless it and 1 are the only ones. Digits that begin with a zero, as in 007, are names.
    """
    if labels == {UNLABELLED_NUMBER, "1"}:
        return [UNLABELLED_NUMBER, "1"]
    found = labels - {UNLABELLED_NUMBER}
    if found and all(_COUNTING.fullmatch(label) for label in found):
        most = max(map(int, found))
        if most < max_numbers:
            return [str(label) for label in range(most + 1)]
    return sorted(found)
