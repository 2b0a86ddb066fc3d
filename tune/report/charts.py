"""The charts of a sweep: curves, heat maps, cost against accuracy, importance."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune.report.canvas import (
    GRID,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    Canvas,
    Chart,
    finish,
    legend_above,
    mark,
    new_canvas,
    separate_labels,
)
from tune.results import Measured, baseline_of, has_seeds, importance, varied_fields, what_intervals_are
from tune.space import value_text
from tune.summary import RATIO, short_names
from tune.trial import LABEL_FIELDS, MEASURES, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURE_NAMES: dict[Measure, str] = {"finetune": "fine-tuning", "probe": "linear probing"}
BASELINE_NAMES: dict[Measure, str] = {"finetune": "from scratch", "probe": "random encoder"}
_SERIES_GAP_PT = 3.0
"""Distance of two lines' marks at one value."""
_LABELS = {
    RATIO: "masking ratio (%)",
    "model.mask": "mask sampling (%)",
    "model.decoder_depth": "decoder depth (blocks)",
    "model.decoder_width": "decoder width",
    "epochs": "epochs of pretraining",
    "finetune.classifier.train_blocks": "fine-tuned blocks",
    "finetune.labels": "labelled images",
}


def charts_of(points: Sequence[Measured], baselines: Sequence[Measured]) -> list[Chart]:
    """Return the charts that the sweep's fields allow: curves, heat maps, cost against accuracy, importance."""
    fields = varied_fields(points)
    found = [_curves(points, baselines, fields, measure) for measure in reversed(MEASURES)] if fields else []
    if len(fields) > 1:
        found += [_heat(points, fields, measure) for measure in reversed(MEASURES)]
    found.append(_cost(points, baselines, fields))
    if len(fields) > 1 or has_seeds(points):
        found += [chart for chart in [_importance(points)] if chart]
    return found


def label_of(field: str) -> str:
    """Return a field's name for people."""
    return _LABELS.get(field, next(iter(short_names([field]).values())).replace("_", " "))


def short_label(field: str) -> str:
    """Return a field's name for people, without its unit."""
    return label_of(field).split(" (")[0]


def value_label(field: str, value: Any) -> str:
    """Return a value for people: mask ratios in percent."""
    if field == "model.mask":
        return f"{value['kind']} {100 * value['ratio']:g}"
    return f"{100 * value:g}" if field == RATIO else value_text(value)


def _axis_fields(fields: Sequence[str]) -> tuple[str, list[str]]:
    """Return the field of the horizontal axis, preferably the mask ratio, and the other varied ones."""
    x = RATIO if RATIO in fields else fields[0]
    return x, [field for field in fields if field != x]


def _curves(points: Sequence[Measured], baselines: Sequence[Measured], fields: list[str], measure: Measure) -> Chart:
    """Draw accuracy against one field, a line per combination of the others, with intervals and the dashed baseline."""
    canvas, (x, others) = new_canvas(), _axis_fields(fields)
    axes, place = canvas.axes, _positions(points, x)
    lines, over_seeds = _series(points, others), has_seeds(points)
    for i, (name, line) in enumerate(lines.items()):
        color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        line = sorted(line, key=lambda measured: place[value_label(x, measured.point[x])])
        at = [place[value_label(x, measured.point[x])] for measured in line]
        found = [measured.drawn(measure, over_seeds=over_seeds) for measured in line]
        # Beside each other, so that one line's interval does not hide another's.
        shift_pt = _SERIES_GAP_PT * (i - (len(lines) - 1) / 2)
        axes.plot(
            at, [one.mean for one in found], f"{marker}-", color=color, linewidth=1.8, markersize=6, label=name or None,
            transform=canvas.shifted(shift_pt),
        )  # fmt: skip
        for position, one, measured in zip(at, found, line):
            mark(canvas, position, one, color, marker, _tip(measured, measure), shift_pt)
    _draw_baselines(canvas, points, baselines, measure, x, place)
    _mark_positions(axes, place, may_be_log=x != RATIO)
    axes.set_xlabel(label_of(x), color=INK, fontsize=9.5)
    axes.set_ylabel("top-1 on val (%)", color=INK, fontsize=9.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if len(lines) > 1:
        legend_above(axes)
    separate_labels(canvas)
    title = f"{MEASURE_NAMES[measure].capitalize()} against {short_label(x)}"
    dashed = f"The dashed line is {_baseline_words(measure)}." if baselines else ""
    return finish(canvas, f"curves-{measure}", title, f"{what_intervals_are(points)} {dashed}".strip())


def _series(points: Sequence[Measured], fields: Sequence[str]) -> dict[str, list[Measured]]:
    """Group the points by their values of these fields, for a colour each."""
    lines: dict[str, list[Measured]] = {}
    for measured in points:
        name = ", ".join(f"{short_label(field)} {value_label(field, measured.point[field])}" for field in fields)
        lines.setdefault(name, []).append(measured)
    return lines


def _baseline_words(measure: Measure) -> str:
    return "training from scratch on the same labels" if measure == "finetune" else "the probe of a random encoder"


def _draw_baselines(
    canvas: Canvas,
    points: Sequence[Measured],
    baselines: Sequence[Measured],
    measure: Measure,
    x: str,
    place: dict[str, float],
) -> None:
    """Draw a dashed line: one level, or a value per label share if that is the horizontal axis."""
    over_seeds = has_seeds(points)
    if x in LABEL_FIELDS:
        at = {value_label(x, m.point[x]): baseline_of(m.point, baselines) for m in points}
        line = sorted(
            (place[label], found.drawn(measure, over_seeds=over_seeds))
            for label, found in at.items()
            if found is not None
        )
        levels = [one for _, one in line]
        canvas.axes.plot([p for p, _ in line], [one.mean for one in levels], color=MUTED, linestyle=(0, (5, 4)))
        for position, one in line:
            mark(canvas, position, one, MUTED, "x", f"{BASELINE_NAMES[measure]}: {one} %")
        return
    for baseline in baselines:
        one = baseline.drawn(measure, over_seeds=over_seeds)
        tip = canvas.tip(f"{BASELINE_NAMES[measure]}: {one} %")
        canvas.axes.axhline(one.mean, color=MUTED, linestyle=(0, (5, 4)), linewidth=1.3, gid=tip, zorder=1)
        if one.low < one.high:
            canvas.axes.axhspan(one.low, one.high, color=MUTED, alpha=0.13, linewidth=0, zorder=0)
        text = f"{BASELINE_NAMES[measure]} {one.mean:.1f}"
        at = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 3), "textcoords": "offset points"}
        canvas.axes.annotate(text, (1, one.mean), ha="right", va="bottom", fontsize=8.5, color=MUTED, **at)


def _positions(points: Sequence[Measured], field: str) -> dict[str, float]:
    """Return the position of every value by its label: numbers where they are, words in the order of the space."""
    values = {value_label(field, measured.point[field]): measured.point[field] for measured in points}
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values())
    if not is_number:
        return {label: float(i) for i, label in enumerate(values)}
    factor = 100 if field == RATIO else 1
    return {label: factor * float(value) for label, value in sorted(values.items(), key=lambda item: item[1])}


def _mark_positions(axes: "Axes", place: dict[str, float], *, may_be_log: bool) -> None:
    """Place a tick at every value; numbers that span a factor of eight may stand on a logarithmic axis."""
    low, high = min(place.values()), max(place.values())
    if may_be_log and low > 0 and high / low >= 8 and len(place) > 2:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(place.values()), list(place))


def _heat(points: Sequence[Measured], fields: list[str], measure: Measure) -> Chart:
    """Draw the mean over all trials at each pair of values of the first two fields."""
    x, others = _axis_fields(fields)
    y = others[0]
    columns, rows = _positions(points, x), _positions(points, y)
    cells: dict[tuple[str, str], list[Measured]] = {}
    for measured in points:
        place = value_label(y, measured.point[y]), value_label(x, measured.point[x])
        cells.setdefault(place, []).append(measured)
    values = [
        [_mean(cells[row, column], measure) if (row, column) in cells else math.nan for column in columns]
        for row in rows
    ]
    canvas = new_canvas(1.2 + 0.42 * min(len(rows), 8))
    axes = canvas.axes
    every = [value for row in values for value in row if not math.isnan(value)]
    low, high = min(every), max(every)
    axes.pcolormesh(values, cmap="viridis", edgecolors="none", vmin=low, vmax=high if high > low else low + 1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                is_light = high > low and (value - low) / (high - low) > 0.6
                is_best = value == high
                color, weight = "#000000" if is_light else "#fffffe", "bold" if is_best else "normal"
                text = f"{value:.1f}"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=color, fontsize=9, fontweight=weight)
    axes.set_xticks([j + 0.5 for j in range(len(columns))], list(columns))
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(rows))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(label_of(x), color=INK, fontsize=9.5)
    axes.set_ylabel(label_of(y), color=INK, fontsize=9.5)
    separate_labels(canvas)
    names = f"{short_label(x)} x {short_label(y)}"
    note = f"Top-1 on val in percent, mean over seeds{' and the other fields' if len(others) > 1 else ''}."
    return finish(canvas, f"heat-{measure}", f"{MEASURE_NAMES[measure].capitalize()}: {names}", note)


def _mean(some: Sequence[Measured], measure: Measure) -> float:
    values = [entry[measure] for measured in some for entry in measured.entries]
    return sum(values) / len(values)


def _cost(points: Sequence[Measured], baselines: Sequence[Measured], fields: list[str]) -> Chart:
    """Draw fine-tuning accuracy against the duration of a trial, and join the points that no cheaper one reaches."""
    canvas = new_canvas()
    axes = canvas.axes
    series = _series(points, _axis_fields(fields)[1] if fields else [])
    for i, line in enumerate(series.values()):
        color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        for measured in line:
            mark(canvas, measured.minutes, measured.of("finetune"), color, marker, _tip(measured, "finetune"))
    for baseline in baselines:
        one = baseline.of("finetune")
        mark(canvas, baseline.minutes, one, MUTED, "x", f"from scratch: {one} %, {baseline.minutes:.1f} min")
        # Towards the middle, so that it crosses neither side of the axes.
        is_left = baseline.minutes <= statistics.median(measured.minutes for measured in points)
        axes.annotate("from scratch", (baseline.minutes, one.mean), (7 if is_left else -7, 0), va="center",
                      textcoords="offset points", ha="left" if is_left else "right", fontsize=8.5,
                      color=MUTED)  # fmt: skip
    front: list[Measured] = []
    for measured in sorted(points, key=lambda m: (m.minutes, -m.of("finetune").mean)):
        if not front or measured.of("finetune").mean > front[-1].of("finetune").mean:
            front.append(measured)
    steps = [measured.of("finetune").mean for measured in front]
    axes.step([m.minutes for m in front], steps, where="post", color=MUTED, linewidth=1.2, zorder=1)
    best = max(points, key=lambda m: m.of("finetune").mean)
    ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.4}
    axes.plot([best.minutes], [best.of("finetune").mean], "o", zorder=5, **ring)
    axes.set_xlabel("minutes per trial, with probe and fine-tuning", color=INK, fontsize=9.5)
    axes.set_ylabel("fine-tuned top-1 on val (%)", color=INK, fontsize=9.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.margins(0.1)
    colors = " Colours are those of the curves." if len(series) > 1 else ""
    note = f"The line joins points that no cheaper point reaches; the ring marks the best.{colors}"
    return finish(canvas, "cost", "Cost against accuracy", note)


def _importance(points: Sequence[Measured]) -> Chart | None:
    """Draw the share of the variance that each field explains, a bar per measure; None if all trials agree."""
    shares: dict[Measure, dict[str, float]] = {}
    for measure in reversed(MEASURES):
        if found := importance(points, measure):
            shares[measure] = found
    if not shares:
        return None
    words = {"seed": "seed alone", "together": "fields together"}
    names = list(next(iter(shares.values())))
    canvas = new_canvas(1.3 + 0.5 * len(names))
    height = 0.8 / len(shares)
    for i, (measure, found) in enumerate(shares.items()):
        places = [j + (i - (len(shares) - 1) / 2) * height for j in range(len(names))]
        values = [found[name] for name in names]
        canvas.axes.barh(places, values, height * 0.86, color=SERIES[i], label=MEASURE_NAMES[measure])
        for place, share in zip(places, values):
            at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            canvas.axes.annotate(f"{share:.0f} %", (share, place), fontsize=8.5, color=INK, **at)
    canvas.axes.set_yticks(range(len(names)), [words.get(name) or short_label(name) for name in names])
    canvas.axes.invert_yaxis()
    canvas.axes.set_xlim(0, 112)
    canvas.axes.set_xticks([])
    canvas.axes.spines[["bottom"]].set_visible(False)
    canvas.axes.tick_params(length=0)
    legend_above(canvas.axes)
    note = "Share of the variance of top-1 between all trials that each field explains alone (eta squared)."
    return finish(canvas, "importance", "What accuracy depends on", note)


def _tip(measured: Measured, measure: Measure) -> str:
    """Return the words of a mark: the point, its accuracy and its cost."""
    point = ", ".join(f"{label_of(field)} {value_label(field, value)}" for field, value in measured.point.items())
    seeds = f", {len(measured.entries)} seeds" if len(measured.entries) > 1 else ""
    return f"{point}: {measured.of(measure)} %{seeds}, {measured.minutes:.1f} min"
