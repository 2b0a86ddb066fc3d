"""`python -m mae_core.bench`: `mae bench step` without Ray and the command line's libraries."""

import argparse
import ast
import dataclasses
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from mae_core.bench.config import StepConfig
from mae_core.bench.step import measure, table
from mae_core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one model after another; return exit status 2 for an error that the user can fix."""
    arguments = vars(_parser().parse_args(argv))
    as_json = arguments.pop("json")
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        for found in measure(StepConfig(**fields)):
            print(json.dumps(found) if as_json else table(found), flush=True)
    except UserError as error:
        print(f"mae_core.bench: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """Build a parser with a flag per field of the config, explained by the field's docstring."""
    parser = argparse.ArgumentParser(prog="python -m mae_core.bench", description=StepConfig.__doc__)
    parser.add_argument("--json", action="store_true", help="One JSON object per model, one per line.")
    types, helps = get_type_hints(StepConfig), _docstrings(StepConfig)
    for field in dataclasses.fields(StepConfig):
        kind, many = types[field.name], False
        if get_origin(kind) is tuple:
            kind, many = get_args(kind)[0], True
        choices = get_args(kind) or None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if choices else kind,
            choices=choices,
            nargs="*" if many else None,
            default=field.default,
            help=f"{helps[field.name]} [{field.default}]".replace("%", "%%"),
        )
    return parser


def _docstrings(cls: type) -> dict[str, Any]:
    """Read the docstring below each field of a dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: after.value.value
        for node, after in zip(body.body, body.body[1:])
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


if __name__ == "__main__":
    sys.exit(main())
