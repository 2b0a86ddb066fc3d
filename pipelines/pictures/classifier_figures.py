"""Draw what a classifier confuses, and how far its confidence can be trusted."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _GRAY, _BLUE, _RED = "#222222", "#666666", "#1f5fa8", "#c2571a"
_MOST_NAMED, _MOST_NUMBERED, _MOST_LETTERS = 60, 25, 24


def confusion_figure(counts: NDArray[np.integer], classes: Sequence[str], title: str) -> bytes:
    """Return a PNG of the confusion matrix: rows are true classes, colours are shares of a row.

    Cells hold counts up to 25 classes, and axes hold names up to 60. Rows of classes without an image stay blank.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(classes)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(100 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    side = float(np.clip(2.6 + 0.36 * size, 4.2, 11))
    figure = Figure(figsize=(side + 1.2, side + 0.3), dpi=150, layout="constrained")
    axes = figure.subplots()
    # The square root shows confusions of 1 % beside a diagonal of 95 %.
    shown = axes.imshow(np.where(shares > 0, shares, np.nan), cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    axes.set_title(_plain(title), fontsize=11, loc="left", color=_INK)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if size <= _MOST_NAMED:
        names = [_short(name) for name in classes]
        font_pt = 9 if size <= _MOST_NUMBERED else 6.5
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font_pt)
        axes.set_yticks(range(size), names, fontsize=font_pt)
    if size <= _MOST_NUMBERED:
        font_pt = min(9.0, 90 / max(size, len(str(counts.max())) * size / 3))
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 30 else _INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=font_pt)
    axes.tick_params(length=0)
    axes.spines[:].set_color("#cccccc")
    bar = figure.colorbar(shown, ax=axes, shrink=0.75, pad=0.02, format="%g")
    bar.set_label("share of the true class (%)", color=_GRAY)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return _png(figure)


def reliability_figure(
    counts: NDArray[np.integer],
    accuracy: NDArray[np.floating],
    confidence: NDArray[np.floating],
    error: float,
    title: str,
) -> bytes:
    """Return a PNG of accuracy against confidence in bins, above a histogram of the confidence (Guo et al. 2017).

    Accuracy and confidence are shares, nan in empty bins; `error` is the calibration error in percent.
    """
    from matplotlib.figure import Figure

    edges = np.linspace(0, 100, len(counts) + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    filled = counts > 0
    figure = Figure(figsize=(5.2, 6.2), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    above.plot([0, 100], [0, 100], color=_GRAY, linestyle=(0, (5, 4)), linewidth=1.1, label="perfectly calibrated")
    right, sure = 100 * accuracy[filled], 100 * confidence[filled]
    lower, gap = np.minimum(right, sure), np.abs(right - sure)
    above.bar(centres[filled], lower, width, color=_BLUE, alpha=0.35)
    above.bar(centres[filled], gap, width, lower, color=_RED, alpha=0.35, label="gap to mean confidence")
    above.hlines(right, edges[:-1][filled], edges[1:][filled], color=_BLUE, linewidth=2.5, label="accuracy")
    above.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    above.set_title(_plain(title), fontsize=11, loc="left", color=_INK)
    above.legend(frameon=False, fontsize=9, loc="upper left", title=f"ECE {error:.2f} %", alignment="left")
    below.bar(centres, counts, width, color=_GRAY, edgecolor="white")
    below.set(xlabel="confidence (%)", ylabel="images")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return _png(figure)


def _short(name: str) -> str:
    """Return the name with its middle left out if it is long: classes often differ in their last letters alone."""
    half = _MOST_LETTERS // 2 - 1
    return _plain(name if len(name) <= _MOST_LETTERS else f"{name[:half]}...{name[-half:]}")


def _plain(text: str) -> str:
    # matplotlib reads text between dollar signs as mathematics.
    return text.replace("$", r"\$")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
