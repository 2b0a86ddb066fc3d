"""Summary of a sweep: a table, the figure, and the best configuration as a preset."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mae_core.errors import UserError
from pipelines.config import KINDS, PretrainConfig, to_dict
from tune.figures import masking_ratio_figure
from tune.space import describe, value_text
from tune.trial import MEASURES, Measure, Trial

RATIO = "model.mask.ratio"
Entry = dict[str, Any]


def best_of(entries: Sequence[Entry], select_by: Measure) -> Entry:
    """Return the finished trial with the highest accuracy on val; ties go to the other measure, then to the order.

    Raises UserError if none has finished.
    """
    finished = [entry for entry in entries if not entry["error"]]
    if not finished:
        raise UserError("no trial has finished, so none is the best; check the trials' errors")
    other = next(measure for measure in MEASURES if measure != select_by)
    return max(finished, key=lambda entry: (entry[select_by], entry[other]))


def table(entries: Sequence[Entry], best_key: str) -> str:
    """Format one aligned row per trial: point, visible patches, results on val; `*` marks the best."""
    names = _short_names(list(entries[0]["point"]))
    head = ["", *names.values(), "visible", "probe", "fine-tuned", "loss", "minutes"]
    rows = [head]
    for entry in entries:
        mark = "*" if entry["key"] == best_key else ""
        visible = f"{entry['visible']}/{entry['patches']}"
        cells = [mark, *(value_text(entry["point"][field]) for field in names), visible]
        if entry["error"]:
            rows.append([*cells, "failed", "failed", "", ""])
        else:
            accuracies = [f"{entry[measure]:.2f}" for measure in MEASURES]
            rows.append([*cells, *accuracies, f"{entry['loss']:.4f}", f"{entry['duration_s'] / 60:.1f}"])
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
    failed = [entry for entry in result["trials"] if entry["error"]]
    lines += [f"failed: {describe(entry['point'])}: {entry['error']}" for entry in failed]
    if failed:
        lines.append("rerun the same command to retry failed trials")
    labels = {"model": "model", "figure": "figure", "best_preset": "preset"}
    lines += [f"{label}: {result[key]}" for key, label in labels.items() if result[key]]
    lines.append(f"next: mae pretrain --preset {shlex.quote(result['best_preset'])}")
    return "\n".join(lines)


def preset_of(config: PretrainConfig, sweep: str, best: Entry, tests: Mapping[Measure, float | None]) -> bytes:
    """Return a preset file for `mae pretrain`, with a header that states its origin and results."""
    reached = [f"val: probe {best['probe']:.2f}, fine-tuned {best['finetune']:.2f}"]
    if tests["finetune"] is not None:
        reached.append(f"test: probe {tests['probe']:.2f}, fine-tuned {tests['finetune']:.2f}")
    header = [
        f"The best of sweep {sweep}: {describe(best['point'])}.",
        "Run:     mae pretrain --preset best.yaml",
        f"Cost:    {best['duration_s'] / 60:.1f} minutes in the sweep, with probe and fine-tuning.",
        f"Reached: top-1 in percent on {'; on '.join(reached)}.",
    ]
    values = {"kind": KINDS[PretrainConfig], **to_dict(config)}
    comments = "".join(f"# {line}\n" for line in header)
    return (comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode()


def figure_of(trials: Sequence[Trial], entries: Sequence[Entry]) -> bytes:
    """Return masking_ratio.png of the finished trials; empty if the mask ratio was not varied.

    Trials of one ratio and decoder depth that differ in other fields, such as the seed, become a mean and a spread.
    """
    groups: dict[tuple[float, int], list[Entry]] = {}
    for trial, entry in zip(trials, entries, strict=True):
        model = trial.pretrain.config.model
        if RATIO in trial.point and not entry["error"]:
            groups.setdefault((model.mask.ratio, model.decoder_depth), []).append(entry)
    if not groups:
        return b""
    points = []
    for (ratio, depth), members in groups.items():
        point: dict[str, Any] = {"ratio": ratio, "decoder_depth": depth}
        for measure in MEASURES:
            values = [entry[measure] for entry in members]
            point |= {measure: statistics.mean(values), f"{measure}_std": statistics.pstdev(values)}
        points.append(point)
    with TemporaryDirectory(prefix="mae-figure-") as scratch:
        path = Path(scratch) / "masking_ratio.png"
        masking_ratio_figure(points, path)
        return path.read_bytes()


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """Map every field to its shortest suffix of words that no other field ends with."""
    names = {}
    for field in fields:
        parts = field.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        rivals = [f".{other}" for other in fields if other != field]
        names[field] = next((end for end in ends if not any(rival.endswith(f".{end}") for rival in rivals)), field)
    return names
