"""Draw the result of a sweep over mask ratios in the style of the paper's Figure 5."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mae_core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measure = Literal["finetune", "probe"]
Point = Mapping[str, Any]

_TITLES: dict[Measure, str] = {"finetune": "fine-tuning", "probe": "linear probing"}
_BASELINES: dict[Measure, str] = {"finetune": "from\nscratch", "probe": "random\nencoder"}
_COLORS = ("#1f5fa8", "#c2571a", "#2f8f4e", "#7d4aa5", "#8a6d1f", "#444444")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GRAY = "#666666"
_FONT_PT, _LABEL_WIDTH_PT, _LABEL_HEIGHT_PT, _MARKER_PT = 8.5, 25.0, 10.5, 10.0
_CLUMP_PT, _SIDE_PT = 12.0, 20.0
_BAR_GAP_PT = 3.0
_LIFTS_PT = (10.0, 12.0, 14.0, 17.0, 20.0, 23.0, 26.0, 29.0, 32.0)
_SMALLEST_PAD = 0.6
"""Minimum margin above and below in percent, so that a flat line looks flat."""


def masking_ratio_figure(
    points: Sequence[Point], path: Path, baselines: Mapping[str, float | None] | None = None, note: str = ""
) -> None:
    """Draw fine-tuning above linear probing, against mask ratio, with one line per decoder depth.

    A point has `ratio`, `decoder_depth`, `finetune` and `probe` (top-1 in percent; None if the trial did not measure
    it) and optionally an interval, `finetune_low` to `finetune_high` and `probe_low` to `probe_high`. `baselines` may
    give the same of training from scratch (`finetune`) and of a random encoder (`probe`): a dashed line in a band.
    `note` stands below and says what the intervals are. Raises UserError if there is no point.
    """
    from matplotlib.figure import Figure

    measures: list[Measure] = [m for m in _TITLES if any(p.get(m) is not None for p in points)]
    if not measures:
        raise UserError("no trial has a result, so there is nothing to draw; check the trials' errors")
    figure = Figure(figsize=(7.2, 1.2 + 3.0 * len(measures)), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0])
    depths = sorted({p["decoder_depth"] for p in points if any(p.get(m) is not None for m in measures)})
    for axes, measure in zip(panels, measures):
        _draw(axes, points, measure, depths, baselines or {})
    _mark_ratios(panels[-1], sorted({100 * p["ratio"] for p in points}), note)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    named = [f"decoder of {depth} block{'s' if depth > 1 else ''}" for depth in depths]
    figure.legend(
        [handles[name] for name in named], named, loc="outside upper center", ncols=min(3, len(named)), frameon=False
    )
    figure.draw_without_rendering()  # fixes the layout, so that labels can be placed by distances in points
    for axes, measure in zip(panels, measures):
        _write_values(axes, points, measure, depths, (baselines or {}).get(measure))
    figure.savefig(path)


def _draw(axes: "Axes", points: Sequence[Point], measure: Measure, depths: list[int], baselines: Point) -> None:
    """Draw lines, intervals and baseline of one measure."""
    from matplotlib.transforms import ScaledTranslation

    ends = [end for p in (*points, baselines) for end in _interval(p, measure)]
    lowest, highest = min(ends), max(ends)
    baseline = baselines.get(measure)
    for i, depth in enumerate(depths):
        line = _line(points, measure, depth)
        x, y = [100 * p["ratio"] for p in line], [p[measure] for p in line]
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        name = f"decoder of {depth} block{'s' if depth > 1 else ''}"
        axes.plot(x, y, color=color, marker=marker, markersize=5.5, linewidth=1.8, label=name)
        # Beside each other, so that one depth's interval does not hide another's.
        shift = ScaledTranslation((i - (len(depths) - 1) / 2) * _BAR_GAP_PT / 72, 0, axes.figure.dpi_scale_trans)
        for at, (low, high) in zip(x, (_interval(p, measure) for p in line)):
            if low < high:
                style: dict[str, Any] = {"color": color, "alpha": 0.6, "transform": axes.transData + shift}
                axes.plot([at, at], [low, high], marker="_", markersize=6, linewidth=1, **style)
    if baseline is not None:
        axes.axhspan(*_interval(baselines, measure), color=_GRAY, alpha=0.12, linewidth=0, zorder=0)
        axes.axhline(baseline, color=_GRAY, linestyle=(0, (5, 4)), linewidth=1.1, zorder=1)
        # To the right of the panel, where no line can cross it.
        at = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
        text = f"{_BASELINES[measure]}\n{baseline:.1f}"
        axes.annotate(text, (1, baseline), ha="left", va="center", fontsize=_FONT_PT, color=_GRAY, **at)
    pad = max(0.28 * (highest - lowest), _SMALLEST_PAD)
    axes.set_ylim(lowest - pad, highest + pad)
    axes.set_title(_TITLES[measure], fontsize=11, loc="left")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_ratios(axes: "Axes", ratios: list[float], note: str) -> None:
    """Place a tick at every measured ratio on the shared axis, if there is room."""
    width = max(ratios[-1] - ratios[0], 10.0)
    axes.set_xlim(ratios[0] - 0.09 * width, ratios[-1] + 0.09 * width)
    if min([b - a for a, b in itertools.pairwise(ratios)], default=width) > width / 24:
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("\n".join(["masking ratio (%)", *([note] if note else [])]))


def _write_values(
    axes: "Axes", points: Sequence[Point], measure: Measure, depths: list[int], baseline: float | None
) -> None:
    """Write every value near its marker, overlapping no marker and no other value; omit values without room."""
    pt_per_dot = 72 / axes.figure.dpi

    def on_paper(ratio: float, value: float) -> tuple[float, float]:
        x, y = axes.transData.transform((100 * ratio, value))
        return x * pt_per_dot, y * pt_per_dot

    lines = {depth: _line(points, measure, depth) for depth in depths}
    markers = [on_paper(p["ratio"], p[measure]) for line in lines.values() for p in line]
    middle = (min(markers)[0] + max(markers)[0]) / 2
    dashes = None if baseline is None else on_paper(0, baseline)[1]
    taken: list[tuple[float, float, float]] = []  # x and y of a value, y of its marker
    for i, depth in enumerate(depths):
        for point in lines[depth]:
            at = on_paper(point["ratio"], point[measure])
            position = _free_position(at, markers, taken, dashes, outwards=1 if at[0] > middle else -1)
            if position is None:
                continue
            taken.append((*position, at[1]))
            axes.annotate(
                f"{point[measure]:.1f}",
                (100 * point["ratio"], point[measure]),
                (position[0] - at[0], position[1] - at[1]),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=_FONT_PT,
                color=_COLORS[i % len(_COLORS)],
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
            )


def _free_position(
    at: tuple[float, float],
    markers: list[tuple[float, float]],
    taken: list[tuple[float, float, float]],
    dashes: float | None,
    outwards: int,
) -> tuple[float, float] | None:
    """Return a free position for the value of the marker at `at`: above, below or beside it, or None; all in points."""
    x, y = at
    near = [my for mx, my in markers if abs(mx - x) < _LABEL_WIDTH_PT / 2 + 3]
    # The upper of two neighbours is labelled above, the lower below.
    side = 1 if sum(my > y for my in near) <= sum(my < y for my in near) else -1
    lifts = [direction * lift for lift, direction in itertools.product(_LIFTS_PT, (side, -side))]
    # Beyond another marker, a value would seem to belong to that one, unless the two almost coincide.
    own = [lift for lift in lifts if not any(_CLUMP_PT < (my - y) * (1 if lift > 0 else -1) < abs(lift) for my in near)]
    beside = [(x + outwards * _SIDE_PT, y), (x - outwards * _SIDE_PT, y)]
    for px, py in [(x, y + lift) for lift in own] + beside:
        is_free = (
            all(abs(my - py) >= _MARKER_PT - 0.5 or abs(mx - px) >= _SIDE_PT - 4 for mx, my in markers)
            and all(abs(ty - py) >= _LABEL_HEIGHT_PT or abs(tx - px) >= _LABEL_WIDTH_PT for tx, ty, _ in taken)
            # Values of one ratio are in the order of their markers.
            and all((ty - py) * (my - y) >= 0 for tx, ty, my in taken if abs(tx - px) < 8)
            and (dashes is None or abs(dashes - py) >= _LABEL_HEIGHT_PT / 2)
        )
        if is_free:
            return px, py
    return None


def _line(points: Sequence[Point], measure: Measure, depth: int) -> list[Point]:
    return sorted(
        (p for p in points if p["decoder_depth"] == depth and p.get(measure) is not None), key=lambda p: p["ratio"]
    )


def _interval(point: Point, measure: Measure) -> tuple[float, ...]:
    """Return both ends of the interval, which are the value itself if there is none; empty without a value."""
    value = point.get(measure)
    return () if value is None else (point.get(f"{measure}_low", value), point.get(f"{measure}_high", value))
