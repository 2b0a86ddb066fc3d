"""The points of a sweep: field values for each trial's pretraining."""

import difflib
import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from mae_core.errors import UserError
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, identity, to_dict, with_overrides

Point = dict[str, Any]
Parts = tuple[PretrainConfig, ClassifyConfig, ClassifyConfig]
_CLASSIFIERS = ("probe.", "finetune.")


def points(config: SweepConfig) -> list[Point]:
    """Return the trials' points, in a stable order: dotted fields with their parsed values.

    A grid varies the last field fastest. A random search draws without repetition, and with the same seed a longer
    search begins with the shorter one. Raises UserError for a field or value that is refused, and for two points that
    would be the same trial.
    """
    check_fields(config)
    found: list[Point] = []
    first: dict[str, Point] = {}
    for point in _grid(config.space) if config.search == "grid" else _random(config):
        parts = parts_at(config, point)
        found.append(_parsed(parts, point))
        key = json.dumps([identity(part) for part in parts], sort_keys=True)
        if key in first:
            raise UserError(
                f"space points {describe(first[key])} and {describe(point)} are the same trial; remove one (names, "
                "outputs, tracking, checkpoints, evaluations and workers change no result)"
            )
        first[key] = point
    return found


def check_fields(config: SweepConfig) -> None:
    """Raise UserError, with the nearest name, for a field of the space that does not exist."""
    for field in config.space:
        _check_field(field, config)


def parsed(config: SweepConfig, point: Point) -> Point:
    """Return the point with its parsed values. Raises UserError if one is refused."""
    return _parsed(parts_at(config, point), point)


def parts_at(config: SweepConfig, point: Point) -> Parts:
    """Return the configs of pretraining, probe and fine-tuning with the point's values.

    Raises UserError that names the point if one is refused.
    """
    pretrain, probe, finetune = (_of_part(point, prefix) for prefix in ("", *_CLASSIFIERS))
    try:
        return (
            with_overrides(config.pretrain, pretrain),
            with_overrides(config.probe, probe),
            with_overrides(config.finetune, finetune),
        )
    except ValueError as error:
        raise UserError(f"space point {describe(point)}: {error}") from None


def varies_classifiers(config: SweepConfig) -> bool:
    """Return whether the space has fields of probe or fine-tuning, so that points may share a pretraining."""
    return any(field.startswith(_CLASSIFIERS) for field in config.space)


def _of_part(point: Point, prefix: str) -> Point:
    """Return the point's fields of one part without their prefix; the prefix of pretraining is empty."""
    if prefix:
        return {field.removeprefix(prefix): value for field, value in point.items() if field.startswith(prefix)}
    return {field: value for field, value in point.items() if not field.startswith(_CLASSIFIERS)}


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


def _parsed(parts: Parts, point: Point) -> Point:
    """Return the point with the values that the configs made from it have: YAML's "1e-3" becomes a number."""
    values: dict[str, Any] = dict(zip(("", *_CLASSIFIERS), map(to_dict, parts), strict=True))
    prefixes = {field: next((prefix for prefix in _CLASSIFIERS if field.startswith(prefix)), "") for field in point}
    return {field: _look_up(values[prefix], field.removeprefix(prefix)) for field, prefix in prefixes.items()}


def _look_up(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found[part]
    return found


def _check_field(field: str, config: SweepConfig) -> None:
    classifiers = {prefix: getattr(config, prefix[:-1]) for prefix in _CLASSIFIERS}
    parts = {"": config.pretrain, **classifiers}
    known = [name for prefix, part in parts.items() for name in _fields(to_dict(part), prefix)]
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
