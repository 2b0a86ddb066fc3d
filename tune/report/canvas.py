"""The figure of one chart: its colours and marks, and how it becomes a PNG, an SVG and an element of the page.

Drawn with matplotlib. The colours stand for variables of `style.css`, into which the page's SVG turns them.
"""

import io
import math
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from tune.results import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

INK, MUTED, GRID = "#1b2026", "#67707b", "#e3e7eb"
SERIES = ("#1f5fa8", "#c2571b", "#2f8f4f", "#7d4aa6", "#8a6d1e", "#0f8a94")
MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
_WIDTH_IN, _HEIGHT_IN = 5.0, 3.4
_LABEL_GAP_PT = 4.0
"""Distance of two labels of an axis."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the report."""

    name: str
    """File name without suffix."""
    title: str
    note: str
    """What it shows, in a sentence, also for readers who do not see it."""
    png: bytes
    svg: bytes
    inline: str
    """SVG element for the page: without colours of its own, and with a tooltip on each value."""


@dataclass
class Canvas:
    """A figure with one pair of axes, and the tooltips of its marks by their ids."""

    figure: "Figure"
    axes: "Axes"
    tips: dict[str, str]

    def tip(self, text: str) -> str:
        """Return the id of a mark with this tooltip."""
        name = f"tip{len(self.tips)}"
        self.tips[name] = text
        return name

    def shifted(self, points: float) -> "Transform":
        """Return the transform of data that are drawn this many points to the right of their place."""
        from matplotlib.transforms import ScaledTranslation

        return self.axes.transData + ScaledTranslation(points / 72, 0, self.figure.dpi_scale_trans)


def new_canvas(height_in: float = _HEIGHT_IN) -> Canvas:
    """Return an empty figure in the colours of the report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    figure.patch.set_facecolor("none")
    axes: Axes = figure.subplots()
    axes.patch.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.set_axisbelow(True)
    return Canvas(figure, axes, {})


def legend_above(axes: "Axes") -> None:
    """Place the legend above the axes, where it hides neither a line nor a bar nor the baseline."""
    axes.legend(
        frameon=False, fontsize=8.5, labelcolor=INK, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2,
        borderaxespad=0.2,
    )  # fmt: skip


def mark(canvas: Canvas, x: float, one: Interval, color: str, marker: str, tip: str, shift_pt: float = 0.0) -> None:
    """Draw a mean and its interval, `shift_pt` to the right of its place."""
    at: dict[str, Any] = {"transform": canvas.shifted(shift_pt), "color": color}
    if one.low < one.high:
        canvas.axes.plot([x, x], [one.low, one.high], "-", linewidth=1.3, alpha=0.75, **at)
        canvas.axes.plot([x, x], [one.low, one.high], "_", markersize=7, alpha=0.75, **at)
    canvas.axes.plot([x], [one.mean], marker, markersize=6, gid=canvas.tip(tip), zorder=4, **at)
    # matplotlib scales the axes by what has their own transform alone.
    canvas.axes.update_datalim([(x, one.low), (x, one.high)])
    canvas.axes.autoscale_view()


def separate_labels(canvas: Canvas) -> None:
    """Lower each label of the horizontal axis that would touch the one before it; empty it if there is no room either.

    Pages show them in fonts of the reader's, so that some room stays between two.
    """
    canvas.figure.draw_without_rendering()
    px_per_pt = canvas.figure.dpi / 72
    rows = [-math.inf, -math.inf]
    labels = [(label.get_window_extent(), label.get_text()) for label in canvas.axes.get_xticklabels()]
    texts: dict[float, str] = {}
    for box, text in sorted(labels, key=lambda label: label[0].x0):
        row = next((row for row, end in enumerate(rows) if box.x0 >= end + _LABEL_GAP_PT * px_per_pt), None)
        texts[box.x0] = "" if row is None else "\n" * row + text
        if row is not None:
            rows[row] = box.x1
    canvas.axes.set_xticks(canvas.axes.get_xticks(), [texts[box.x0] for box, _ in labels])


def finish(canvas: Canvas, name: str, title: str, note: str) -> Chart:
    """Lay the figure out and return it in all its forms."""
    import matplotlib

    png, svg = io.BytesIO(), io.BytesIO()
    # Lay out once for both files.
    canvas.figure.draw_without_rendering()
    canvas.figure.set_layout_engine("none")
    canvas.figure.savefig(png, format="png", dpi=160, facecolor="white")
    # Text stays text, so that it takes the page's font and can be searched and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        canvas.figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    label = f"{title}. {note}"
    return Chart(
        name=name,
        title=title,
        note=note,
        png=png.getvalue(),
        svg=svg.getvalue(),
        inline=_inline(svg.getvalue().decode(), name, label, canvas.tips),
    )


def _inline(svg: str, name: str, label: str, tips: dict[str, str]) -> str:
    """Return matplotlib's SVG as an element of a page: colours by variables, tooltips, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    for mark, tip in tips.items():
        svg = svg.replace(f'<g id="{mark}">', f'<g class="tip"><title>{escape(tip)}</title>')
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    [view_box] = re.findall(r'<svg [^>]*viewBox="([^"]+)"', svg)
    root = f'<svg viewBox="{view_box}" role="img" aria-label="{escape(label)}">'
    return root + svg[svg.index(">") + 1 :].replace("xlink:href", "href")
