"""`mae promote`: point an alias to a version that passes a gate, unless somebody else moved the alias meanwhile."""

import dataclasses
from typing import Any

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import GateConfig, PromoteConfig, load_preset
from pipelines.promotion.gate import Verdict, judge, text_of


def promote(model: str, config: PromoteConfig) -> dict[str, Any]:
    """Promote the version that NAME@ALIAS or NAME/VERSION means; return what was decided, with the gate's figures.

    Both versions are pinned before they are measured. A refusal has `ok` False and moves nothing. Raises UserError for
    wrong input, for a version whose files were altered, and if the alias was moved by somebody else meanwhile.
    """
    registry.check_alias(config.to)
    registry.check_why(config.why)
    if not config.gate and not config.force:
        raise UserError("no gate is given; try --gate nano_gate, or --force with --why to promote without one")
    gate = load_preset(GateConfig, config.gate) if config.gate else None
    if gate is not None and config.data:
        gate = dataclasses.replace(gate, data=config.data)
    tracking = registry.open_tracking(config.experiment)
    ref = tracking.resolve(registry.model_uri(model))
    history = tracking.history(ref.name, config.to)
    decided: dict[str, Any] = {"model": ref.uri, "alias": config.to, "champion": _uri(ref.name, history.version)}
    if history.version == ref.version:
        return decided | {"promoted": False, "text": f"{history.shown} points to version {ref.version} already"}
    tracking.verify(ref)
    champion = tracking.resolve(decided["champion"]) if history.version else None
    verdict = judge(ref, champion, gate, config.gate, config.output, tracking) if gate else None
    is_passed = verdict is not None and verdict.is_passed
    lines = text_of(verdict, gate) if verdict and gate else []
    decided |= {"figures": verdict.figures if verdict else {}, "run_id": verdict.run_id if verdict else ""}
    decided["unmet"] = [threshold.figure for threshold in verdict.unmet] if verdict else []
    if not is_passed and not config.force:
        said = f"{ref.uri} is refused by {config.gate}; {history.shown} stays at {_shown(history.version)}"
        return decided | {"ok": False, "promoted": False, "text": "\n".join([*lines, said, *_seen(verdict)])}
    decision = registry.Decision(
        kind="promote",
        why=config.why,
        gate=config.gate,
        run_id=decided["run_id"],
        forced=not is_passed,
        figures=_few(decided["figures"]),
    )
    moved = tracking.move_alias(history, ref, decision).moves[history.number_of_next - 1]
    how = "forced" if moved.forced else f"passed {config.gate}"
    said = f"{history.shown} moved from {_shown(history.version)} to version {ref.version} ({how})"
    added = {"promoted": True, "forced": moved.forced, "by": moved.by, "at": moved.at}
    return decided | added | {"text": "\n".join([*lines, said, *_seen(verdict)])}


def _seen(verdict: Verdict | None) -> list[str]:
    return [f"evaluation: MLflow run {verdict.run_id}"] if verdict else []


def _few(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures that a record and a tag can hold; all are in the evaluation's run."""
    return {name: round(value, 4) for name, value in list(figures.items())[:60]}


def _uri(name: str, version: int) -> str:
    return f"models:/{name}/{version}" if version else ""


def _shown(version: int) -> str:
    return f"version {version}" if version else "no version"
