"""What the trials of a sweep found: means with intervals over seeds, the best point, the importance of each field."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mae_core.errors import UserError
from tune.space import Point
from tune.trial import LABEL_FIELDS, Measure, is_stopped

Entry = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean of `num` values with both ends of its 95 % confidence interval, which are the mean if there is none."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        spread = f" ± {self.high - self.mean:.2f}" if self.num > 1 else ""
        return f"{self.mean:.2f}{spread}"


def interval_of_images(accuracy: float, num_images: int) -> Interval:
    """Return an accuracy in percent with the 95 % interval of Wilson that its number of images leaves it.

    It says how far another set of as many images may differ, not another training.
    """
    from scipy.stats import binomtest

    found = binomtest(round(accuracy / 100 * num_images), num_images).proportion_ci(0.95, "wilson")
    return Interval(accuracy, 100 * found.low, 100 * found.high, 1)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of the values with its interval by Student's t, which needs two values at least."""
    mean, num = statistics.fmean(values), len(values)
    if num < 2:
        return Interval(mean, mean, mean, num)
    from scipy.stats import t

    half = float(t.ppf(0.975, num - 1)) * statistics.stdev(values) / num**0.5
    return Interval(mean, mean - half, mean + half, num)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The finished trials of one point, or of one baseline: one per seed."""

    point: Point
    entries: tuple[Entry, ...]

    def of(self, measure: Measure) -> Interval:
        """Return top-1 on val in percent."""
        return interval([entry[measure] for entry in self.entries])

    def drawn(self, measure: Measure, *, over_seeds: bool) -> Interval:
        """Return top-1 on val in percent, with the interval over seeds or that of one seed over the images of val.

        Trials before 2026-11-29 did not record the number of images: they have none over images.
        """
        num_images = 0 if over_seeds else self.entries[0].get("num_val", {}).get(measure, 0)
        found = self.of(measure)
        return interval_of_images(found.mean, num_images) if num_images else found

    @property
    def minutes(self) -> float:
        """Mean duration of a trial."""
        return statistics.fmean(entry["duration_s"] for entry in self.entries) / 60


def has_seeds(measured: Sequence[Measured]) -> bool:
    """Return whether a point has more than one seed, so that intervals are drawn over seeds."""
    return any(len(one.entries) > 1 for one in measured)


def what_intervals_are(measured: Sequence[Measured]) -> str:
    """Return a sentence that says what the drawn intervals of these points are; empty if there is none."""
    if has_seeds(measured):
        return "Bars are 95 % intervals over seeds."
    nums = sorted({num for one in measured for entry in one.entries for num in entry.get("num_val", {}).values()})
    if not nums:
        return ""
    shown = " or ".join(f"{num:,}" for num in nums)
    return f"Bars are 95 % intervals of accuracies on {shown} images of val; each point is one seed."


def is_baseline(entry: Entry) -> bool:
    """Return whether the entry is one of a trial without pretraining."""
    return entry.get("kind") == "scratch"


def has_result(entry: Entry) -> bool:
    """Return whether the entry's trial has its accuracies: it neither failed nor was stopped early."""
    return not entry["error"] and not is_stopped(entry)


def measured_points(entries: Sequence[Entry]) -> list[Measured]:
    """Return the points of which a trial has finished, in the order of the sweep."""
    return _measured([entry for entry in entries if not is_baseline(entry)])


def measured_baselines(entries: Sequence[Entry]) -> list[Measured]:
    """Return the baselines of which a trial has finished; more than one if points differ in labels or encoder."""
    return _measured([entry for entry in entries if is_baseline(entry)])


def baseline_of(point: Point, baselines: Sequence[Measured]) -> Measured | None:
    """Return the baseline with the point's labels; None if there is none."""
    labels = {field: point[field] for field in LABEL_FIELDS if field in point}
    return next((baseline for baseline in baselines if baseline.point == labels), None)


def best_of(entries: Sequence[Entry], select_by: Measure) -> Entry:
    """Return the first finished trial of the point with the highest mean accuracy on val.

    Ties go to the other measure, then to the order. The first seed stands for its point, since the best one would be
    chosen by luck. Raises UserError if no trial has finished.
    """
    points = measured_points(entries)
    if not points:
        raise UserError("no trial has finished, so none is the best; check the trials' errors")
    other: Measure = "probe" if select_by == "finetune" else "finetune"
    return max(points, key=lambda point: (point.of(select_by).mean, point.of(other).mean)).entries[0]


def varied_fields(points: Sequence[Measured]) -> list[str]:
    """Return the fields with two or more values among the points, in the order of the space."""
    fields = points[0].point if points else {}
    return [field for field in fields if len({json.dumps(measured.point[field]) for measured in points}) > 1]


def importance(points: Sequence[Measured], measure: Measure) -> dict[str, float]:
    """Return the share of the variance of the accuracy that each varied field explains alone, in percent.

    It is the sum of squares between the field's values, over that between all trials (eta squared of an analysis of
    variance). "seed" is the share within points; "together" is the rest, which only several fields explain together.
    Empty if all trials agree. In a sweep that is no complete grid, shares of fields may overlap.
    """
    trials = [(measured.point, entry[measure]) for measured in points for entry in measured.entries]
    total = _squares(trials, lambda point: "")
    if not total:
        return {}
    between = {
        field: total - _squares(trials, lambda point, field=field: json.dumps(point[field]))
        for field in varied_fields(points)
    }
    shares = {field: 100 * square / total for field, square in between.items()}
    within = 100 * _squares(trials, lambda point: json.dumps(point, sort_keys=True)) / total
    if has_seeds(points):
        shares["seed"] = within
    if len(between) > 1:
        shares["together"] = max(0.0, 100 - within - sum(100 * square / total for square in between.values()))
    return shares


def _squares(trials: Sequence[tuple[Point, float]], group: Callable[[Point], str]) -> float:
    """Return the sum of squares around the means of the groups."""
    groups: dict[str, list[float]] = {}
    for point, value in trials:
        groups.setdefault(group(point), []).append(value)
    return sum((value - statistics.fmean(values)) ** 2 for values in groups.values() for value in values)


def _measured(entries: Sequence[Entry]) -> list[Measured]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if has_result(entry):
            groups.setdefault(json.dumps(entry["point"], sort_keys=True), []).append(entry)
    return [Measured(point=some[0]["point"], entries=tuple(some)) for some in groups.values()]
