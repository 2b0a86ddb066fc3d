"""Judge a version by a gate against the version that an alias points to, and log that as a run linked to both.

1. Measure both on the same images, with the same settings and seeds.
2. Compare them by a paired bootstrap: the gain in each setting, and what each class loses.
3. Give the figures and the gate's thresholds to MLflow's validation.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import GateConfig, to_dict
from pipelines.evaluation.gains import Comparison, compare
from pipelines.evaluation.models import digest_of
from pipelines.evaluation.report import html_report
from pipelines.pictures.gate_figures import class_figure, gain_figure
from pipelines.promotion.measuring import (
    Measured,
    Setting,
    flops_of,
    measure_backbones,
    measure_classifiers,
    settings_of,
)
from pipelines.registry import ModelRef, Threshold, Tracking

_WORST_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found, and whether the version passed."""

    figures: dict[str, float]
    unmet: list[Threshold]
    thresholds: list[Threshold]
    comparisons: dict[str, Comparison]
    """By the name of the setting."""
    run_id: str = ""

    @property
    def is_passed(self) -> bool:
        return not self.unmet


def judge(
    candidate: ModelRef, champion: ModelRef | None, gate: GateConfig, preset: str, output: str, tracking: Tracking
) -> Verdict:
    """Measure, compare and log the versions.

    Raises UserError for wrong input or a damaged version, and RunFailed if a training fails.
    """
    is_backbone = candidate.tags.get("mae.kind") == "backbone"
    settings = settings_of(gate, is_trained=is_backbone)
    refs = [candidate, *([champion] if champion else [])]
    digests = dict.fromkeys(setting.manifest.digest for setting in settings)
    # The place of a dataset does not matter: its digest does.
    asked = json.dumps(to_dict(dataclasses.replace(gate, data=())), sort_keys=True)
    name = f"{Path(preset).stem}-{digest_of([asked, *digests])[:12]}"
    cost = _cost(candidate, champion, tracking)
    measured = (
        measure_backbones(refs, settings, gate, name, output, tracking)
        if is_backbone
        else measure_classifiers(refs, settings, gate, name, output, tracking.experiment)
    )
    comparisons = {
        setting.name: _compare(measured, setting, candidate, champion, gate, seed)
        for seed, setting in enumerate(settings)
    }
    verdict = judged(comparisons, cost, gate)
    return _log(verdict, candidate, champion, gate, name, settings, tracking)


def judged(comparisons: Mapping[str, Comparison], cost: float | None, gate: GateConfig) -> Verdict:
    """Return the figures of the comparisons and of the cost (None without a champion), and which are out of bounds."""
    figures: dict[str, float] = {}
    thresholds: list[Threshold] = []

    def require(figure: str, value: float, bound: float, *, is_least: bool) -> None:
        figures[figure] = value
        thresholds.append(Threshold(figure, bound, is_least))

    for name, found in comparisons.items():
        require(f"{name}/{gate.metric}", found.candidate.value, gate.min_value, is_least=True)
        if found.champion is None or found.gain is None:
            continue
        figures[f"{name}/champion_{gate.metric}"] = found.champion.value
        figures |= {f"{name}/gain": found.gain.value, f"{name}/gain_high": found.gain.high or 0.0}
        require(f"{name}/gain_low", found.gain.low or 0.0, gate.min_gain, is_least=True)
        worst = found.losses[found.worst_class]
        figures[f"{name}/class_loss"] = worst.value
        require(f"{name}/class_loss_low", worst.low or 0.0, gate.max_class_loss, is_least=False)
    if cost is not None:
        require("cost", cost, gate.max_cost, is_least=False)
    failed = registry.unmet(figures, thresholds)
    return Verdict(figures=figures, unmet=failed, thresholds=thresholds, comparisons=dict(comparisons))


def _cost(candidate: ModelRef, champion: ModelRef | None, tracking: Tracking) -> float | None:
    """Return the operations per image of the candidate's encoder as a multiple of the champion's."""
    return flops_of(candidate, tracking) / flops_of(champion, tracking) if champion else None


def _compare(
    measured: Mapping[tuple[str, str], Measured],
    setting: Setting,
    candidate: ModelRef,
    champion: ModelRef | None,
    gate: GateConfig,
    seed: int,
) -> Comparison:
    ours, shares = measured[candidate.uri, setting.name], None
    if champion is not None:
        theirs = measured[champion.uri, setting.name]
        if not np.array_equal(ours.ids, theirs.ids):
            raise UserError(
                f"{candidate.uri} was measured on {len(ours.ids)} images of {setting.uri} and {champion.uri} on "
                f"{len(theirs.ids)}, so they cannot be compared; remove their runs and promote again"
            )
        shares = theirs.shares
    return compare(ours.labels, ours.shares, shares, metric=gate.metric, num_resamples=gate.num_resamples, seed=seed)


def _log(
    verdict: Verdict,
    candidate: ModelRef,
    champion: ModelRef | None,
    gate: GateConfig,
    name: str,
    settings: Sequence[Setting],
    tracking: Tracking,
) -> Verdict:
    """Log the verdict as a run with both versions as inputs; return the verdict with the run's id."""
    against = f"{champion.version}" if champion else "none"
    key = re.sub(r"[^\w./-]", "-", f"{name}-{candidate.name}-{candidate.version}-against-{against}")
    tags = {"mae.gate": name, "mae.verdict": "passed" if verdict.is_passed else "refused"}
    run = tracking.run(key, "gate", to_dict(gate), tags=tags, context="evaluation")
    for setting in {setting.uri: setting for setting in settings}.values():
        run.log_dataset(setting.manifest, setting.uri, "evaluation")
    run.log_model_input(candidate, tag="mae.model")
    if champion is not None:
        run.log_model_input(champion, tag="mae.champion")
    known = run.last_steps()
    if not verdict.figures.keys() <= known.keys():
        run.log_model_metrics(candidate, verdict.figures)
        if champion is not None:
            theirs = {f"{n}/{gate.metric}": c.champion.value for n, c in verdict.comparisons.items() if c.champion}
            run.log_model_metrics(champion, theirs)
    with TemporaryDirectory(prefix="mae-gate-") as scratch:
        for file, content in _files(verdict, candidate, champion, gate).items():
            path = Path(scratch) / file
            path.write_bytes(content)
            run.log_file(path)
    run.finish()
    return dataclasses.replace(verdict, run_id=run.id)


def _files(verdict: Verdict, candidate: ModelRef, champion: ModelRef | None, gate: GateConfig) -> dict[str, bytes]:
    title = f"{candidate.uri.removeprefix('models:/')} against {champion.version if champion else 'no champion'}"
    pictures = {"gains.png": gain_figure(verdict.comparisons, gate.metric, gate.min_gain, title)}
    if champion is not None:
        pictures["classes.png"] = class_figure(verdict.comparisons, gate.max_class_loss, title)
    facts = {
        "candidate": candidate.uri,
        "champion": champion.uri if champion else "none",
        "verdict": "passed" if verdict.is_passed else "refused",
    }
    report = html_report(
        f"Gate: {title}", facts, [], {"Figures": _rows(verdict), **_class_tables(verdict)},
        {name.removesuffix(".png"): content for name, content in pictures.items()},
    )  # fmt: skip
    values = {
        **facts,
        "figures": verdict.figures,
        "unmet": [asdict(threshold) for threshold in verdict.unmet],
        "settings": {name: asdict(found) for name, found in verdict.comparisons.items()},
    }
    return {**pictures, "report.html": report, "result.json": json.dumps(values, indent=1).encode()}


def _rows(verdict: Verdict) -> list[list[Any]]:
    bounds = {threshold.figure: threshold for threshold in verdict.thresholds}
    rows: list[list[Any]] = [["figure", "value", "bound", ""]]
    for name, value in verdict.figures.items():
        bound = bounds.get(name)
        fails = "fails" if bound in verdict.unmet else "passes"
        rows.append([name, f"{value:.2f}", bound.shown if bound else "", fails if bound else ""])
    return rows


def _class_tables(verdict: Verdict) -> dict[str, list[list[Any]]]:
    tables = {}
    for name, found in verdict.comparisons.items():
        worst = sorted(found.losses.items(), key=lambda item: -item[1].value)[:_WORST_CLASSES]
        rows = [[c, f"{i.value:.2f}", f"{i.low or 0:.2f} to {i.high or 0:.2f}"] for c, i in worst]
        if rows:
            tables[f"{name}: classes that lose most"] = [["class", "loss (points)", "95 % interval"], *rows]
    return tables


def text_of(verdict: Verdict, gate: GateConfig) -> list[str]:
    """Format the numbers of a verdict as lines, each threshold that is not met with its bound."""
    lines = []
    for name, found in verdict.comparisons.items():
        lines.append(f"{name}: {gate.metric} {found.candidate.value:.2f} % on {found.num_images} images")
        if found.champion is not None and found.gain is not None:
            worst = found.losses[found.worst_class]
            lines[-1] += (
                f", champion {found.champion.value:.2f} %, gain {found.gain.value:+.2f} "
                f"({found.gain.low:+.2f} to {found.gain.high:+.2f}); largest loss of a class: {found.worst_class} "
                f"{worst.value:.2f} ({worst.low:.2f} to {worst.high:.2f})"
            )
    if "cost" in verdict.figures:
        lines.append(f"cost: {verdict.figures['cost']:.2f} times the champion's operations per image")
    lines += [f"not met: {t.figure} is {verdict.figures[t.figure]:.2f}, must be {t.shown}" for t in verdict.unmet]
    return lines
