"""The points of a sweep: field values for each trial's pretraining."""

import difflib
import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from mae_core.errors import UserError
from pipelines.config import PretrainConfig, SweepConfig, identity, to_dict, with_overrides

Point = dict[str, Any]


def points(config: SweepConfig) -> list[Point]:
    """Return the trials' points, in a stable order: dotted fields of the pretraining config with their parsed values.

    A grid varies the last field fastest. A random search draws without repetition, and with the same seed a longer
    search begins with the shorter one. Raises UserError for a field or value that pretraining refuses, and for two
    points that would be the same trial.
    """
    for field in config.space:
        _check_field(field, config.pretrain)
    found: list[Point] = []
    first: dict[str, Point] = {}
    for point in _grid(config.space) if config.search == "grid" else _random(config):
        pretrain = at(config.pretrain, point)
        found.append(_parsed(pretrain, point))
        key = json.dumps(identity(pretrain), sort_keys=True)
        if key in first:
            raise UserError(
                f"space points {describe(first[key])} and {describe(point)} are the same trial; remove one (names, "
                "outputs, tracking, checkpoints, evaluations and workers change no result)"
            )
        first[key] = point
    return found


def at(config: PretrainConfig, point: Point) -> PretrainConfig:
    """Return the pretraining config with the point's values.

    Raises UserError that names the point if one is refused.
    """
    try:
        return with_overrides(config, point)
    except ValueError as error:
        raise UserError(f"space point {describe(point)}: {error}") from None


def describe(point: Point) -> str:
    """Format the point as a user writes it."""
    return ", ".join(f"{field}={value_text(value)}" for field, value in point.items())


def value_text(value: Any) -> str:
    """Format a value of a point compactly."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":")).replace('"', "")


def _grid(space: dict[str, list[Any]]) -> Iterator[Point]:
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _random(config: SweepConfig) -> Iterator[Point]:
    """Draw points by their index in the grid, which is never built: it may have more points than fit in memory."""
    total = math.prod(map(len, config.space.values()))
    draw = random.Random(config.seed)
    seen: set[int] = set()
    while len(seen) < min(config.num_trials, total):
        index = draw.randrange(total)
        if index not in seen:
            seen.add(index)
            yield _point_at(index, config.space)


def _point_at(index: int, space: dict[str, list[Any]]) -> Point:
    point = {}
    for field in reversed(space):
        index, i = divmod(index, len(space[field]))
        point[field] = space[field][i]
    return {field: point[field] for field in space}


def _parsed(config: PretrainConfig, point: Point) -> Point:
    """Return the point with the values that the config made from it has: YAML's "1e-3" becomes a number."""
    values = to_dict(config)
    return {field: _look_up(values, field) for field in point}


def _look_up(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found[part]
    return found


def _check_field(field: str, config: PretrainConfig) -> None:
    known = list(_fields(to_dict(config)))
    if field in known:
        return
    same_end = [name for name in known if name.endswith(f".{field}")]
    near = [*same_end, *difflib.get_close_matches(field, known, 1)]
    hint = f"did you mean {near[0]}?" if near else "`mae config pretrain` lists all"
    raise UserError(f"unknown field {field!r} in space; {hint}")


def _fields(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
