"""Draw what a gate compared: the gain in each setting, and the classes that lose most."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _GRAY, _BLUE, _RED = "#222222", "#666666", "#1f5fa8", "#c2571a"
_MOST_CLASSES = 25


class _Interval(Protocol):
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class _Comparison(Protocol):
    @property
    def candidate(self) -> _Interval: ...
    @property
    def champion(self) -> _Interval | None: ...
    @property
    def gain(self) -> _Interval | None: ...
    @property
    def losses(self) -> Mapping[str, _Interval]: ...


def gain_figure(comparisons: Mapping[str, _Comparison], metric: str, min_gain: float, title: str) -> bytes:
    """Return a PNG of the gain of each setting with its interval, against the least gain; values without a champion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.6 + 0.45 * len(comparisons)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for row, found in enumerate(comparisons.values()):
        shown = found.gain or found.candidate
        color = _BLUE if found.gain is None or (shown.low or 0.0) >= min_gain else _RED
        _draw_interval(axes, row, shown, color)
    has_gain = any(found.gain for found in comparisons.values())
    if has_gain:
        axes.axvline(min_gain, color=_GRAY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(comparisons)), [_plain(name) for name in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel(f"gain in {metric} (points), dashed: least gain" if has_gain else f"{metric} (%)")
    axes.set_title(_plain(title), fontsize=11, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def class_figure(comparisons: Mapping[str, _Comparison], max_loss: float, title: str) -> bytes:
    """Return a PNG: for each setting the classes that lose most accuracy, with intervals, against the most allowed."""
    from matplotlib.figure import Figure

    rows = max(min(len(found.losses), _MOST_CLASSES) for found in comparisons.values())
    figure = Figure(figsize=(5.5 * len(comparisons), 1.8 + 0.3 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(1, len(comparisons), squeeze=False)
    for axes, (name, found) in zip(grid[0], comparisons.items()):
        worst = sorted(found.losses.items(), key=lambda item: -item[1].value)[:_MOST_CLASSES]
        for row, (_, loss) in enumerate(worst):
            _draw_interval(axes, row, loss, _RED if (loss.low or 0.0) > max_loss else _BLUE)
        axes.axvline(max_loss, color=_GRAY, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(worst)), [_plain(label)[:24] for label, _ in worst])
        axes.set_ylim(len(worst) - 0.5, -0.5)
        axes.set_xlabel("loss of accuracy (points), dashed: most allowed")
        axes.set_title(_plain(name), fontsize=10, loc="left", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_plain(title), fontsize=11, color=_INK)
    return _png(figure)


def _draw_interval(axes: object, row: int, shown: _Interval, color: str) -> None:
    low, high = (shown.value if end is None else end for end in (shown.low, shown.high))
    axes.plot([low, high], [row, row], color=color, linewidth=2)  # pyright: ignore[reportAttributeAccessIssue]
    axes.plot([shown.value], [row], "o", color=color, markersize=5)  # pyright: ignore[reportAttributeAccessIssue]


def _plain(text: str) -> str:
    """Return the text without what matplotlib reads as a formula."""
    return text.replace("$", r"\$")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
