"""Labels as sources store them, as class names: text, JSON values, and Arrow columns. Nothing is ever unpickled."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.types as pat

from mae_core.errors import UserError

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category")
"""Columns and keys that are taken for the label without being named, in this order."""
LABEL_MEMBERS = ("cls", "cls.txt", "label", "class")
"""Members beside an image that are taken for its label without being named, in this order."""
UNLABELLED_NUMBER = "-1"
_LIKELY = re.compile(
    r"(?:^|[_\-. ])(?:labels?|class(?:es)?|cls|targets?|categor(?:y|ies)|species|diagnosis|dx|breed|y)(?:$|[_\-. 0-9])"
)
_WHOLE = re.compile(r"(-?\d+)\.0*")
_MAX_LABEL_BYTES = 1024


def class_of(value: Any, where: str, remedy: str) -> str:
    """Return the name of the class that a value means; empty for a missing one.

    Whole numbers of any type are integers. Raises UserError for a list, a fraction, or any other type.
    """
    if value is None or (isinstance(value, float) and value != value):  # NaN
        return ""
    if isinstance(value, bool | str | int):
        return str(value).strip()
    if isinstance(value, float | Decimal) and value == int(value):
        return str(int(value))
    if isinstance(value, float | Decimal):
        raise UserError(f"{where} has label {value}, but a class is a name or a whole number; {remedy}")
    what = "a list" if isinstance(value, list) else f"of type {type(value).__name__}"
    raise UserError(f"{where} has a label that is {what}, but an image has one class; {remedy}")


def class_of_text(text: str) -> str:
    """Return the class that a text names, in which pandas may have written an integer as 3.0."""
    found = text.strip()
    whole = _WHOLE.fullmatch(found)
    return whole[1] if whole else "" if found.lower() in ("nan", "null", "<na>") else found


def class_of_member(content: bytes, where: str) -> str:
    """Return the class in a small text file. Raises UserError if it is none."""
    try:
        label = class_of_text(content.decode()) if len(content) <= _MAX_LABEL_BYTES else ""
    except UnicodeDecodeError:
        label = ""
    if not label or "\n" in label:
        raise UserError(f"{where} contains no class; it must be a number or a name in UTF-8, on one line")
    return label


def class_in_json(content: bytes, key: str, where: str) -> str:
    """Return the class under a key, which dots may lead into; empty if it is missing. Raises UserError."""
    try:
        value = json.loads(content)
    except ValueError:
        raise UserError(f"{where} is not JSON; copy it again, or choose other --labels") from None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return class_of(value, f"key {key} of {where}", "name another key by --labels json:KEY, or use --labels none")


def label_keys(content: bytes) -> list[str]:
    """Return the keys of a JSON object that may hold a class."""
    try:
        values = json.loads(content)
    except ValueError:
        return []
    scalars = [k for k, v in values.items() if isinstance(v, str | int | float)] if isinstance(values, dict) else []
    return [key for key in scalars if is_likely(key)]


def is_likely(name: str) -> bool:
    """Return whether a column or key has the name of a label, such as fine_label."""
    return _LIKELY.search(name.lower()) is not None


def takes(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold classes, if its values are whole."""
    if pat.is_dictionary(kind):
        return takes(kind.value_type)
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


def classes_of_column(column: pa.ChunkedArray, names: Sequence[str], where: str, remedy: str) -> list[str]:
    """Return the class of each row; empty for a missing one.

    With the `names` that the Hub's schema has, integers are positions in them, and -1 is missing. Raises UserError for
    what is no class.
    """
    found = []
    for value in column.to_pylist():
        label = class_of(value, where, remedy)
        if names and label and not isinstance(value, str):
            number = int(label)
            if not -1 <= number < len(names):
                raise UserError(f"{where} has label {number}, but {len(names)} class names; fix its schema")
            label = "" if number < 0 else names[number]
        found.append(label)
    return found


def numbers_or_names(labels: set[str], max_numbers: int) -> list[str]:
    """Return the classes in order: names sorted; if all are numbers, every number from 0, so that none changes.

    -1 is no class beside other numbers, unless the only one is 1.
    """
    if all(re.fullmatch(r"-?\d+", label) and label.isascii() for label in labels):
        signed = {int(label) for label in labels}
        if signed == {-1, 1}:
            return ["-1", "1"]
        numbers = {label for label in labels if label != UNLABELLED_NUMBER}
        if not numbers:
            return []
        distinct = {int(label) for label in numbers}
        if min(distinct) >= 0 and max(distinct) < max_numbers and len(distinct) == len(numbers):
            return [str(label) for label in range(max(distinct) + 1)]
    return sorted(labels)
