"""Summary of a sweep: a table, the figure, and the best configuration as a preset."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipelines.config import KINDS, PretrainConfig, to_dict
from tune.figures import masking_ratio_figure
from tune.results import (
    Entry,
    Measured,
    has_result,
    has_seeds,
    is_baseline,
    measured_baselines,
    measured_points,
    what_intervals_are,
)
from tune.space import describe, value_text
from tune.trial import MEASURES, Measure, Trial, is_stopped

RATIO = "model.mask.ratio"


def table(entries: Sequence[Entry], best_key: str) -> str:
    """Format one aligned row per point and baseline: visible patches, results on val; `*` marks the best.

    With several seeds, accuracies are means with half their 95 % interval. A point without a finished trial has
    failed, or was stopped early.
    """
    names = short_names(list(entries[0]["point"]))
    points, baselines = measured_points(entries), measured_baselines(entries)
    with_seeds = has_seeds([*points, *baselines])
    seeds = ["seeds"] if with_seeds else []
    head = ["", *names.values(), "visible", *seeds, "probe", "fine-tuned", "loss", "minutes"]
    rows = [head]
    for measured in (*points, *baselines):
        first = measured.entries[0]
        mark = "*" if any(entry["key"] == best_key for entry in measured.entries) else ""
        visible = "scratch" if is_baseline(first) else f"{first['visible']}/{first['patches']}"
        cells = [mark, *(value_text(measured.point.get(field, "")) for field in names), visible]
        cells += [str(len(measured.entries))] if with_seeds else []
        cells += [str(measured.of(measure)) for measure in MEASURES]
        losses = [entry["loss"] for entry in measured.entries if entry["loss"] is not None]
        rows.append([*cells, f"{statistics.fmean(losses):.4f}" if losses else "", f"{measured.minutes:.1f}"])
    finished = [measured.point for measured in points]
    for entry in entries:
        if not has_result(entry) and not is_baseline(entry) and entry["point"] not in finished:
            where = f"epoch {entry['stopped']['epoch']}" if is_stopped(entry) else ""
            words = ["stopped", where] if where else ["failed", "failed"]
            visible = f"{entry['visible']}/{entry['patches']}"
            cells = ["", *(value_text(entry["point"][field]) for field in names), visible]
            rows.append([*cells, *(["0"] if with_seeds else []), *words, "", ""])
            finished.append(entry["point"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Align the mark left and every value right, so that digits line up.
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """Format the full result for a terminal."""
    best = next(entry for entry in result["trials"] if entry["key"] == result["best_key"])
    lines = [table(result["trials"], result["best_key"]), ""]
    lines.append(f"best by {result['select_by']} on val: {describe(best['point'])}")
    if result["finetune_test"] is not None:
        lines.append(f"its test accuracy: probe {result['probe_test']:.2f}, fine-tuned {result['finetune_test']:.2f}")
    if result.get("scratch_test") is not None:
        lines.append(f"from scratch on the same labels: {result['scratch_test']:.2f}")
    if result.get("is_test_unread"):
        lines.append("test is unread; the same command with --read-test evaluates the best point on it")
    failed = [entry for entry in result["trials"] if entry["error"]]
    lines += [f"failed: {describe(entry['point'])}: {entry['error']}" for entry in failed]
    stopped = sum(is_stopped(entry) for entry in result["trials"])
    if stopped:
        lines.append(f"stopped early by their online probe: {stopped} of {len(result['trials'])} trials")
    if failed:
        lines.append("rerun the same command to retry failed trials")
    if result.get("num_unrun"):
        lines.append(
            f"the budget of {result['budget_hours']:g} h ended before {result['num_unrun']} trials; a larger "
            "--budget-hours continues"
        )
    labels = {"model": "model", "figure": "figure", "report": "report", "best_preset": "preset"}
    lines += [f"{label}: {result[key]}" for key, label in labels.items() if result.get(key)]
    lines.append(f"next: mae pretrain --preset {shlex.quote(result['best_preset'])}")
    return "\n".join(lines)


def preset_of(config: PretrainConfig, sweep: str, best: Measured, tests: Mapping[Measure, float | None]) -> bytes:
    """Return a preset file for `mae pretrain`, with a header that states its origin and results."""
    reached = [f"val: probe {best.of('probe')}, fine-tuned {best.of('finetune')}"]
    if tests["finetune"] is not None:
        reached.append(f"test: probe {tests['probe']:.2f}, fine-tuned {tests['finetune']:.2f}")
    header = [
        f"The best of sweep {sweep}: {describe(best.point)}.",
        "Run:     mae pretrain --preset best.yaml",
        f"Cost:    {best.minutes:.1f} minutes in the sweep, with probe and fine-tuning.",
        f"Reached: top-1 in percent on {'; on '.join(reached)}.",
    ]
    values = {"kind": KINDS[PretrainConfig], **to_dict(config)}
    comments = "".join(f"# {line}\n" for line in header)
    return (comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode()


def figure_of(trials: Sequence[Trial], entries: Sequence[Entry]) -> bytes:
    """Return masking_ratio.png of the finished trials; empty if the mask ratio was not varied.

    Trials of one ratio and decoder depth that differ in other fields, such as the seed, become a mean and an interval.
    """
    models = {trial.key: trial.pretrain.config.model for trial in trials if trial.pretrain}
    groups: dict[tuple[float, int], list[Entry]] = {}
    for entry in entries:
        if RATIO in entry["point"] and has_result(entry):
            model = models[entry["key"]]
            groups.setdefault((model.mask.ratio, model.decoder_depth), []).append(entry)
    if not groups:
        return b""
    measured = {key: Measured(point=members[0]["point"], entries=tuple(members)) for key, members in groups.items()}
    over_seeds, note = has_seeds([*measured.values()]), what_intervals_are([*measured.values()])
    points = [
        {"ratio": ratio, "decoder_depth": depth, **_drawn(one, over_seeds)} for (ratio, depth), one in measured.items()
    ]
    baselines = measured_baselines(entries)
    dashed = _drawn(baselines[0], over_seeds) if len(baselines) == 1 else None
    with TemporaryDirectory(prefix="mae-figure-") as scratch:
        path = Path(scratch) / "masking_ratio.png"
        masking_ratio_figure(points, path, dashed, note)
        return path.read_bytes()


def _drawn(measured: Measured, over_seeds: bool) -> dict[str, float]:
    """Return both accuracies with the ends of their intervals, as the figure takes them."""
    found: dict[str, float] = {}
    for measure in MEASURES:
        one = measured.drawn(measure, over_seeds=over_seeds)
        found |= {measure: one.mean, f"{measure}_low": one.low, f"{measure}_high": one.high}
    return found


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Map every field to its shortest suffix of words that no other field ends with."""
    names = {}
    for field in fields:
        parts = field.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        rivals = [f".{other}" for other in fields if other != field]
        names[field] = next((end for end in ends if not any(rival.endswith(f".{end}") for rival in rivals)), field)
    return names
