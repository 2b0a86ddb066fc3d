"""Convert every dict from outside (YAML, sweep point, checkpoint, train_loop_config) to a config, or refuse it."""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from mae_core.config import ADDED
from mae_core.errors import UserError
from pipelines.config.promoting import GateConfig
from pipelines.config.sweeping import SweepConfig
from pipelines.config.training import ClassifyConfig, PretrainConfig

PRESETS = Path(__file__).parents[1] / "presets"


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Build a config from a dict, with defaults filled in. Raises UserError that names each wrong key or value."""
    if not isinstance(values, dict):
        raise UserError(f"expected fields of {cls.__name__}, got {values!r}; try `key: value` lines")
    unknown = list(_unknown_keys(cls, values, ""))
    if unknown:
        raise UserError("; ".join(unknown))
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError(_in_words(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain dicts, lists and scalars; `from_dict` is the inverse."""
    return _adapter(type(config)).dump_python(config, mode="json")


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    """Return what pydantic made of a class. Making it takes 10 ms, and a sweep reads thousands of configs."""
    return TypeAdapter(cls)


def with_overrides(config: T, point: dict[str, Any]) -> T:
    """Return the config with dotted fields replaced, as in `{"model.mask.ratio": 0.5}`. Raises UserError."""
    values = to_dict(config)
    for dotted, value in point.items():
        *parents, last = dotted.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(f"{dotted} does not name a field of {type(config).__name__}: {parent} has no fields")
        inner[last] = value
    return from_dict(type(config), values)


def load_preset(cls: type[T], preset: str) -> T:
    """Load a config from a YAML file, or from the shipped preset of that name. Raises UserError."""
    return from_dict(cls, _preset_values(cls, preset))


def preset_fields(cls: type, preset: str) -> dict[str, Any]:
    """Return the fields that a preset states by dotted name, such as model.mask.ratio. Raises UserError."""
    return dict(_leaves(_preset_values(cls, preset), ""))


def dotted_fields(config: Any) -> dict[str, Any]:
    """Return every field of a config by dotted name, as a plain value; `with_overrides` takes them."""
    return dict(_leaves(to_dict(config), ""))


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def options_for(config: Any, default: Any) -> list[str]:
    """Return the words of a command line that turn the default into the config, as the `mae` command parses them."""
    base, words = dotted_fields(default), []
    for name, value in dotted_fields(config).items():
        if value == base[name]:
            continue
        *parents, last = name.replace("_", "-").split(".")
        flag = "--" + ".".join([*parents, f"no-{last}" if value is False else last])
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")  # In one word, since the value may begin with a dash.
    return words


def _preset_values(cls: type, preset: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        near = difflib.get_close_matches(preset, names, 1)
        raise UserError(f"no preset {preset!r}; {f'did you mean {near[0]}?' if near else 'try ' + ', '.join(names)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"preset {preset!r} is not YAML: {' '.join(str(error).split())}; fix the file") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind != KINDS[cls]:
        raise UserError(
            f"preset {preset!r} has {f'kind: {kind}' if kind else 'no kind'}, but this command takes {KINDS[cls]}; "
            f"its first key must be kind: {KINDS[cls]}"
        )
    return _on_base(cls, values, (*above, preset))


def _on_base(cls: type, values: dict[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    """Return the values over those of the preset that `base` names, field by field; a space replaces the base's."""
    base = values.pop("base", None)
    if base is None:
        return values
    if base in above:
        raise UserError(f"preset {above[-1]!r} is based on {base!r}, which is based on it; remove one base")
    return _merged(_preset_values(cls, base, above), values)


def _merged(below: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in values.items():
        is_part = key != "space" and isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if is_part else value
    return found


KINDS: dict[type, str] = {
    PretrainConfig: "pretrain",
    ClassifyConfig: "classify",
    SweepConfig: "sweep",
    GateConfig: "gate",
}


def identity(config: Any) -> dict[str, Any]:
    """Return the fields that decide a run's result, so without its name, output folder and number of workers.

    The run that it extends is no part of them: the run's job holds its id.
    """
    values = without_added_defaults(config)
    for part in (values, *(values.get(name, {}) for name in ("pretrain", "probe", "finetune", "scratch"))):
        for key in ("name", "output", "tracking", "checkpoint", "evaluate", "extend", "prepare"):
            part.pop(key, None)
        if "compute" in part:
            compute = part.pop("compute")
            precision = compute["precision"]
            # Runs from before there was an auto, whose default this was, resume with it. What auto chose is not part of
            # a run's identity, but stays with its folder.
            part["precision"] = "float32" if precision == "auto" else precision
            part |= {key: compute[key] for key in ("reduce_in",) if key in compute}
        # The dataset's location does not matter either: its digest identifies it, and how it was prepared.
        for key in ("uri", "cache"):
            part.get("data", {}).pop(key, None)
    return values


def without_added_defaults(config: Any) -> dict[str, Any]:
    """Convert a config like `to_dict`, leaving out fields marked `ADDED` that have their default."""
    values = to_dict(config)
    _drop_added_defaults(config, values)
    return values


def _drop_added_defaults(config: Any, values: dict[str, Any]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata == ADDED and value == _default(field):
            del values[field.name]
        elif dataclasses.is_dataclass(value):
            _drop_added_defaults(value, values[field.name])


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def config_hash(config: Any, *digests: str) -> str:
    """Hash the identities of the config and of what it reads, first the dataset, to twelve hex digits."""
    said = json.dumps([identity(config), *digests], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def run_name(config: Any, preset: str, dataset_digest: str) -> str:
    """Return the config's name, or the preset's stem and a hash of config and dataset."""
    return config.name or f"{Path(preset).stem}-{config_hash(config, dataset_digest)}"


def _unknown_keys(cls: Any, values: dict[str, Any], prefix: str) -> Iterator[str]:
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            yield f"unknown key {prefix}{key}; {hint}"
        elif dataclasses.is_dataclass(known[key]) and isinstance(value, dict):
            yield from _unknown_keys(known[key], value, f"{prefix}{key}.")


def _in_words(error: ValidationError) -> str:
    lines = []
    for e in error.errors():
        where = ".".join(str(part) for part in e["loc"])
        message = e["msg"].removeprefix("Value error, ")
        got = "" if e["type"] == "value_error" else f", got {e['input']!r}"
        lines.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(lines)
