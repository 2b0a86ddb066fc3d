"""The points of a sweep: which values the trials' pretraining takes."""

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
    """The trials' points, in a stable order: dotted fields of the pretraining with the values they will have.

    A grid varies the last field fastest; a random search draws without repetition, and more trials of the same seed
    begin with the fewer. Raises UserError for a field or a value that pretraining refuses, and for two points that
    would be the same trial.
    """
    for field in config.space:
        _check_field(field, config.pretrain)
    found: list[Point] = []
    first: dict[str, Point] = {}
    for point in _grid(config.space) if config.search == "grid" else _random(config):
        pretrain = at(config.pretrain, point)
        found.append(_as_taken(pretrain, point))
        key = json.dumps(identity(pretrain), sort_keys=True)
        if key in first:
            raise UserError(
                f"space points {said(first[key])} and {said(point)} are the same trial; leave one out (names, outputs, "
                "tracking, checkpoints and workers change no result)"
            )
        first[key] = point
    return found


def at(config: PretrainConfig, point: Point) -> PretrainConfig:
    """The pretraining with the point's values. Raises UserError that names the point where they are refused."""
    try:
        return with_overrides(config, point)
    except ValueError as error:
        raise UserError(f"space point {said(point)}: {error}") from None


def said(point: Point) -> str:
    """The point as a person writes it."""
    return ", ".join(f"{field}={value_text(value)}" for field, value in point.items())


def value_text(value: Any) -> str:
    """A value of a point in few characters."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":")).replace('"', "")


def _grid(space: dict[str, list[Any]]) -> Iterator[Point]:
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _random(config: SweepConfig) -> Iterator[Point]:
    """Points by their place in the grid, which is never built: a space may have more points than memory."""
    total = math.prod(map(len, config.space.values()))
    draw = random.Random(config.seed)
    seen: set[int] = set()
    while len(seen) < min(config.num_trials, total):
        place = draw.randrange(total)
        if place not in seen:
            seen.add(place)
            yield _point_at(place, config.space)


def _point_at(place: int, space: dict[str, list[Any]]) -> Point:
    point = {}
    for field in reversed(space):
        place, i = divmod(place, len(space[field]))
        point[field] = space[field][i]
    return {field: point[field] for field in space}


def _as_taken(config: PretrainConfig, point: Point) -> Point:
    """The point with its values as the config made from it has them: YAML's "1e-3" is a number there."""
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
