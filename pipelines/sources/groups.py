"""The column that says which images belong together, such as a patient's, and must not be in two splits."""

import math

import pyarrow as pa

from mae_core.errors import UserError


def refuse_absent_group(schema: pa.Schema, uri: str, column: str) -> None:
    """Raise UserError if a table has no column of this name."""
    if column and column not in schema.names:
        raise UserError(
            f"{uri} has no column {column!r} to group by, but {', '.join(schema.names)}; name one by --group-by "
            "column:NAME"
        )


def group_of(value: object, where: str) -> str:
    """Return the group that a field names; empty if it is missing. Raises UserError for lists, structs and bytes.

    A whole number is one group whether its file holds integers or floats, as it does where fields are missing.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | dict | tuple | bytes):
        raise UserError(
            f"{where} has a {type(value).__name__} as its group; name a column of texts or numbers by --group-by "
            "column:NAME"
        )
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
