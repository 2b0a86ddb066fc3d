"""Progress of a run on stderr."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.registry.points import Point

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0
_SHOWN = {"train/loss": "loss {:.4f}", "lr": "lr {:.2e}", "images_per_s": "{:,.0f} images/s"}


class ProgressDisplay:
    """Show loss, learning rate, images/s and time left: a progress bar on a terminal, else a log line every 30 s.

    Use it as a context manager.
    """

    def __init__(self, title: str, total_steps: int) -> None:
        self._title, self._total = title, total_steps
        self._values: dict[str, float] = {}
        self._first: Point | None = None
        self._line_due_s = 0.0
        self._shown_step = 0
        self._bar = _bar(title, total_steps) if sys.stderr.isatty() else None

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, points: Sequence[Point]) -> None:
        """Update the display to the newest point."""
        newest = points[-1]
        self._first = self._first or points[0]
        self._values.update((point.key, point.value) for point in points)
        text = self._text(newest)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=newest.step, text=text)
        elif time.monotonic() >= self._line_due_s or self._shown_step < newest.step >= self._total:
            log.info("%s: step %d of %d, %s", self._title, newest.step, self._total, text)
            self._line_due_s = time.monotonic() + _LINE_EVERY_S
            self._shown_step = newest.step

    def _text(self, newest: Point) -> str:
        values = self._values
        parts = [text.format(values[key]) for key, text in _SHOWN.items() if key in values]
        assert self._first is not None
        steps, seconds = newest.step - self._first.step, (newest.time_ms - self._first.time_ms) / 1000
        if steps > 0 and newest.step < self._total:
            left_s = round(seconds / steps * (self._total - newest.step))
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d} left")
        return ", ".join(parts)


def _bar(title: str, total_steps: int) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(title, total=total_steps, text="")
    return bar
