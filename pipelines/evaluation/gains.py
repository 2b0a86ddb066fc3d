"""Compare two models on the same images: the gain in a metric and the loss of each class, with paired intervals.

Of every image we know the share of seeds with which each model classifies it correctly. A resample draws images with
replacement (Efron 1979) and takes the difference of both models on the same draws, so that what is hard for both
cancels out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.metrics import Floats, Interval, Ints, resamples

Names = NDArray[np.str_]
Metric = Literal["top1", "balanced_accuracy"]

_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Comparison:
    """A candidate against a champion, in percent. Without a champion, gain and losses are None and empty."""

    num_images: int
    candidate: Interval
    champion: Interval | None
    gain: Interval | None
    losses: dict[str, Interval]
    """Accuracy that each class loses; negative if it gains."""

    @property
    def worst_class(self) -> str:
        """The class that surely loses most, by the low end of its interval; empty without a champion."""
        return max(self.losses, key=lambda name: self.losses[name].low or 0.0, default="")


def compare(
    labels: Names,
    candidate: Floats,
    champion: Floats | None,
    *,
    metric: Metric,
    num_resamples: int,
    seed: int,
) -> Comparison:
    """Compare the shares [images] with which each image is classified correctly. Images must be in the same order."""
    classes, index = np.unique(labels, return_inverse=True)
    counts = np.concatenate(list(resamples(len(labels), num_resamples, seed)))
    one = np.ones((1, len(labels)))

    def interval(shares: Floats) -> Interval:
        value = _metric(one, shares, index, len(classes), metric)[0]
        drawn = _metric(counts, shares, index, len(classes), metric)
        return _interval(value, drawn)

    if champion is None:
        return Comparison(len(labels), interval(candidate), None, None, {})
    losses = {}
    for number, name in enumerate(classes):
        own = index == number
        lost = (champion - candidate)[own]
        totals = counts[:, own].sum(1)
        drawn = (counts[:, own] @ lost)[totals > 0] / totals[totals > 0]
        losses[str(name)] = _interval(lost.mean(), drawn)
    return Comparison(len(labels), interval(candidate), interval(champion), interval(candidate - champion), losses)


def _metric(weights: NDArray[np.number], shares: Floats, index: Ints, num: int, metric: Metric) -> Floats:
    """Return the metric of each row of weights [rows images]; it is linear in the shares, so it takes differences."""
    if metric == "top1":
        return weights @ shares / weights.sum(1)
    hits = np.stack([np.bincount(index, row * shares, num) for row in weights])
    totals = np.stack([np.bincount(index, row, num) for row in weights])
    recalls = np.divide(hits, totals, out=np.zeros_like(hits), where=totals > 0)
    return recalls.sum(1) / (totals > 0).sum(1)


def _interval(value: float, drawn: Floats) -> Interval:
    low, high = np.percentile(100 * drawn, _LEVELS) if len(drawn) else (100 * value, 100 * value)
    return Interval(100 * float(value), float(low), float(high), len(drawn))
