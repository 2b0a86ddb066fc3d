"""The report of a sweep as one HTML file, which needs no network and no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tune.report.canvas import Chart
from tune.report.charts import BASELINE_NAMES, MEASURE_NAMES, label_of, short_label, value_label
from tune.results import (
    Entry,
    Measured,
    baseline_of,
    has_result,
    interval,
    is_baseline,
    measured_baselines,
    measured_points,
    varied_fields,
)
from tune.space import describe, value_text
from tune.trial import MEASURES, Measure, is_stopped

_HERE = Path(__file__).parent
_ON_TEST: tuple[tuple[Measure, str], ...] = (("finetune", "scratch"), ("probe", "random"))
"""What is measured on test, each with its baseline."""
RATIOS = (0.75, 0.8)
"""Mask ratios of the reconstructions."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures in one row, as data: URIs, and what they are."""

    key: str
    """Key of the trial; empty for originals and masked images."""
    title: str
    pictures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the page shows."""

    name: str
    question: str
    entries: Sequence[Entry]
    best_key: str
    select_by: Measure
    tests: Mapping[str, Sequence[float]]
    """Top-1 on test by what was measured (finetune, probe, scratch, random), one value per seed."""
    charts: Sequence[Chart]
    reconstructions: Mapping[float, Sequence[Row]]
    preset: str
    command: str
    facts: Mapping[str, str]
    """What the page says of the sweep itself, such as dataset and versions."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Address of the MLflow run of each trial, by its key."""
    link_note: str = ""
    """How to reach these addresses."""
    num_unrun: int = 0

    @property
    def best(self) -> Measured:
        """The point with the highest accuracy on val."""
        return next(m for m in measured_points(self.entries) if any(e["key"] == self.best_key for e in m.entries))


def page(study: Study) -> bytes:
    """Return the page."""
    style, script = (_HERE / "style.css").read_text(), (_HERE / "page.js").read_text()
    sections = [
        _head(study),
        _charts(study),
        _reconstructions(study),
        _table(study),
        _preset(study),
        _failures(study),
        _about(study),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(study.name)}</title><style>{style}</style></head><body>",
            *filter(None, sections),
            f"<script>{script}</script></body></html>",
        ]
    ).encode()


def point_text(measured: Measured, points: Sequence[Measured]) -> str:
    """Return a point for people, by the fields that vary."""
    fields = varied_fields(points) or list(measured.point)
    return ", ".join(_field_text(name, measured.point[name]) for name in fields if name in measured.point)


def _field_text(name: str, value: Any) -> str:
    unit, label = ("\u00a0%", "masking ratio") if label_of(name).endswith("(%)") else ("", short_label(name))
    return f"{label}\u00a0{value_label(name, value)}{unit}"


def _head(study: Study) -> str:
    points, baselines = measured_points(study.entries), measured_baselines(study.entries)
    best = study.best
    name = point_text(best, points) or describe(best.point)
    answer = f"Best by {MEASURE_NAMES[study.select_by]} on val: <strong>{escape(name)}</strong>."
    baseline = baseline_of(best.point, baselines)
    if baseline is not None:
        gap = best.of("finetune").mean - baseline.of("finetune").mean
        word = "above" if gap >= 0 else "below"
        answer += f" Fine-tuned, it is {abs(gap):.1f} points {word} training from scratch on the same labels."
    if len(points) > 1:
        answer += f" {_rivals(best, points, study.select_by)}"
    tiles = []
    for measure in reversed(MEASURES):
        small = f"{BASELINE_NAMES[measure]} {baseline.of(measure)}" if baseline else ""
        tiles.append((f"{MEASURE_NAMES[measure]}, val", f"{best.of(measure)} %", small))
    for measure, other in _ON_TEST:
        if study.tests.get(measure):
            small = f"{BASELINE_NAMES[measure]} {interval(study.tests[other])}" if study.tests.get(other) else ""
            tiles.append((f"{MEASURE_NAMES[measure]}, test", f"{interval(study.tests[measure])} %", small))
    num_seeds = max(len(measured.entries) for measured in points)
    finished = sum(has_result(entry) for entry in study.entries)
    tiles.append(("trials", str(finished), f"{_counted(len(points), 'point')}, {_counted(num_seeds, 'seed')}"))
    items = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for title, value, small in tiles
    )
    spread = " ± is half of the 95 % interval over seeds." if num_seeds > 1 else ""
    warning = (
        "" if num_seeds > 1 else "<p class='note'>One seed per point: differences may be chance. Try --seeds 3.</p>"
    )
    read_once = " Test was read once, for the best point alone." if study.tests else ""
    return (
        f"<header><h1>{escape(study.question)}</h1><p class='answer'>{answer}</p><dl class='facts'>{items}</dl>"
        f"<p class='note'>Top-1 accuracy in percent. The best point was chosen on val.{read_once}{spread}</p>"
        f"{warning}</header>"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rivals(best: Measured, points: Sequence[Measured], measure: Measure) -> str:
    """Say how many points the seeds do not tell apart from the best one."""
    top = best.of(measure)
    if top.num < 2:
        return ""
    others = [measured for measured in points if measured.point != best.point]
    rivals = sum(measured.of(measure).high >= top.low for measured in others)
    if not rivals:
        return "Its interval lies above that of every other point."
    if len(others) == 1:
        return "The interval of the other point overlaps with its own."
    share = f"{rivals} of the other {len(others)}" if rivals < len(others) else f"all {len(others)} other"
    return f"The intervals of {share} points overlap with its own."


def _charts(study: Study) -> str:
    figures = "".join(
        f"<figure><figcaption><h3>{escape(chart.title)}</h3><span class='note'>{escape(chart.note)}</span></figcaption>"
        f"{chart.inline}</figure>"
        for chart in study.charts
    )
    return f"<section><h2>What was found</h2><div class='charts'>{figures}</div></section>"


def _reconstructions(study: Study) -> str:
    """Return one table: a row per point, the images at each mask ratio side by side."""
    shown = {ratio: rows for ratio, rows in study.reconstructions.items() if rows}
    if not shown:
        return ""
    best = {entry["key"] for entry in study.best.entries}
    heads = "".join(
        f"<th colspan='{len(rows[0].pictures)}' scope='colgroup'>{ratio:.0%} masked</th>"
        for ratio, rows in shown.items()
    )
    body = []
    for same in zip(*shown.values(), strict=True):
        mark = " class='best'" if same[0].key in best else ""
        cells = "".join(_pictures(row) for row in same)
        body.append(f"<tr{mark}><td>{escape(same[0].title)}</td>{cells}</tr>")
    note = (
        "Images of val, with visible patches pasted. Every point got the same random masks, whatever it was trained "
        "with. The first seed is shown."
    )
    return (
        f"<section><h2>Reconstructions</h2><p class='note'>{note}</p><div class='scroll'><table class='rebuilt'>"
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _pictures(row: Row) -> str:
    cells = []
    for i, uri in enumerate(row.pictures, 1):
        names = [name for name, has in (("first", i == 1), ("pixels", uri.startswith("data:image/png"))) if has]
        alt = escape(f"{row.title}, image {i}")
        cells.append(f"<td><img class='{' '.join(names)}' loading='lazy' alt='{alt}' src='{uri}'></td>")
    return "".join(cells)


def _table(study: Study) -> str:
    """Return the sortable table: a row per trial, with each accuracy, the cost and the MLflow run."""
    points = measured_points(study.entries)
    fields = list(points[0].point)
    best = {entry["key"] for entry in study.best.entries}
    names = ["trial", *(label_of(name) for name in fields), "seed", "fine-tuned", "probe", "loss", "minutes", "run"]
    head = "".join(f"<th scope='col'><button type='button'>{escape(name)}</button></th>" for name in names)
    rows = []
    for i, entry in enumerate(study.entries, 1):
        link = study.links.get(entry["key"], "")
        run = f"<a href='{escape(link)}'>MLflow</a>" if link else ""
        values = [value_label(name, entry["point"][name]) if name in entry["point"] else "" for name in fields]
        cells = [
            _cell(f"{i}{' from scratch' if is_baseline(entry) else ''}", str(i)),
            *(_cell(value, value) for value in values),
            _cell(str(entry.get("seed", 0))),
            *(_accuracy(entry, measure) for measure in reversed(MEASURES)),
            _cell("" if entry["loss"] is None else f"{entry['loss']:.4f}"),
            _cell(f"{entry['duration_s'] / 60:.1f}"),
            f"<td>{run}</td>",
        ]  # fmt: skip
        mark = " class='best'" if entry["key"] in best else ""
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    note = "Press a heading to sort. Accuracies are on val; the best point is marked."
    if study.links:
        note += f" {study.link_note}"
    return (
        f"<section><h2>All trials</h2><p class='note'>{escape(note)}</p><div class='scroll'>"
        f"<table class='sortable'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _accuracy(entry: Entry, measure: Measure) -> str:
    if has_result(entry):
        return _cell(f"{entry[measure]:.2f}")
    return _cell("stopped" if is_stopped(entry) else "failed", "")


def _cell(text: str, value: str | None = None) -> str:
    """Return a cell, which sorts by its text or by another value."""
    data = "" if value is None else f" data-value='{escape(value)}'"
    return f"<td{data}>{escape(text)}</td>"


def _preset(study: Study) -> str:
    return (
        "<section><h2>The best point as a preset</h2><p>Save it as <code>best.yaml</code>, or take the file of that "
        "name in the sweep's folder, and run <code>mae pretrain --preset best.yaml</code>.</p>"
        "<button type='button' class='copy' data-of='preset'>Copy</button>"
        f"<pre id='preset'>{escape(study.preset)}</pre></section>"
    )


def _failures(study: Study) -> str:
    failed = [entry for entry in study.entries if entry["error"]]
    lines = [f"<li>{escape(_entry_text(entry))}: {escape(entry['error'])}</li>" for entry in failed]
    unrun = ""
    if study.num_unrun:
        unrun = f"<p>The budget ended before {study.num_unrun} trials; a larger --budget-hours continues the sweep.</p>"
    stopped = [entry for entry in study.entries if is_stopped(entry)]
    if stopped:
        items = "".join(f"<li>{escape(_entry_text(entry))}: {escape(_stop_text(entry))}</li>" for entry in stopped)
        unrun += f"<p>Early stopping ended these pretrainings, so that they have no result:</p><ul>{items}</ul>"
    if not lines and not unrun:
        return ""
    listed = f"<p>The same command retries failed trials.</p><ul>{''.join(lines)}</ul>" if lines else ""
    return f"<section><h2>What is missing</h2>{unrun}{listed}</section>"


def _stop_text(entry: Entry) -> str:
    where = entry["stopped"]
    return f"epoch {where['epoch']}, {where['online']:.2f} % by the online probe"


def _entry_text(entry: Entry) -> str:
    words = ["from scratch"] if is_baseline(entry) else []
    words += [f"{label_of(name)} {value_text(value)}" for name, value in entry["point"].items()]
    return ", ".join([*words, f"seed {entry.get('seed', 0)}"])


def _about(study: Study) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in study.facts.items())
    return (
        f"<footer><h2>How it was made</h2><pre>{escape(study.command)}</pre>"
        f"<div class='scroll'><table><tbody>{rows}</tbody></table></div></footer>"
    )
