"""`mae lineage`: from a version back to dataset, commit, licence and origin, as text, JSON and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipelines import registry
from pipelines.config import LineageConfig
from pipelines.pictures.lineage_figure import Box, lineage_figure
from pipelines.storage import storage_of

_SHOWN_DIGEST = 12
_COLUMN = 16


def lineage(model: str, config: LineageConfig) -> dict[str, Any]:
    """Trace the version that NAME@ALIAS or NAME/VERSION means; draw it if `config.out` names a picture.

    Raises UserError if there is no such version. A step that the registry has lost is marked as missing.
    """
    tracking = registry.open_tracking(config.experiment)
    uri = registry.model_uri(model)
    steps = tracking.lineage(uri)
    versions = [step for step in steps if step.kind == "model version"]
    runs = [step for step in steps if step.kind == "run"]
    if config.out:
        storage, name = storage_of(config.out)
        storage.write(name, lineage_figure(f"Lineage of {uri.removeprefix('models:/')}", _boxes(steps)))
    return {
        "model": versions[0].id,
        "licence": _first(versions, "licence"),
        "origin": _first(versions, "origin"),
        "datasets": list(dict.fromkeys(step.facts["dataset"] for step in runs if step.facts.get("dataset"))),
        "commits": list(dict.fromkeys(step.facts["commit"] for step in runs if step.facts.get("commit"))),
        "is_complete": not any("missing" in step.facts for step in steps),
        "steps": [asdict(step) for step in steps],
        "picture": config.out,
        "text": _text(uri, steps),
    }


def _first(steps: Sequence[registry.Step], fact: str) -> str:
    return next((step.facts[fact] for step in steps if step.facts.get(fact)), "")


def _chain(steps: Sequence[registry.Step]) -> list[registry.Step]:
    """Return versions and runs alone: a run's facts name its dataset and commit."""
    return [step for step in steps if step.kind in ("model version", "run")]


def _text(uri: str, steps: Sequence[registry.Step]) -> str:
    lines = [uri]
    for step in _chain(steps):
        lines.append(f"{'version' if step.kind == 'model version' else 'made by run'} {step.id}")
        lines += [f"  {name:{_COLUMN}} {value}" for name, value in step.facts.items() if value]
    return "\n".join(lines)


def _boxes(steps: Sequence[registry.Step]) -> list[Box]:
    return [_version_box(step) if step.kind == "model version" else _run_box(step) for step in _chain(steps)]


def _version_box(step: registry.Step) -> Box:
    digests = [f"{name[7:]} {value[:_SHOWN_DIGEST]}" for name, value in step.facts.items() if name.startswith("sha256")]
    others = [f"{name}: {value}" for name, value in step.facts.items() if _is_shown(name) and value]
    return Box(step.id.removeprefix("models:/"), tuple(digests + others))


def _is_shown(fact: str) -> bool:
    return fact in ("licence", "origin", "missing") or fact.endswith((".by", ".at", ".why"))


def _run_box(step: registry.Step) -> Box:
    facts = step.facts
    if "missing" in facts:
        return Box(f"run {step.id}", (facts["missing"],), is_run=True)
    changed = " with uncommitted changes" if facts["uncommitted_changes"] == "true" else ""
    beside = (
        ("dataset", tuple(filter(None, (facts["dataset"][:_SHOWN_DIGEST], facts["dataset_uri"])))),
        ("commit", (facts["commit"][:_SHOWN_DIGEST] + changed,) if facts["commit"] else ()),
    )
    shown = tuple((head, lines) for head, lines in beside if lines)
    return Box(f"{facts['kind']} {facts['name']}".strip(), (f"run {step.id}",), is_run=True, beside=shown)
