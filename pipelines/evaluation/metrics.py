"""Metrics of a classifier's predictions, each in percent, with bootstrap intervals.

Definitions are in docs/evaluation.md. Point values come from scikit-learn, except for the calibration error, which it
lacks. Intervals are percentiles over resamples with replacement (Efron 1979), kept as counts of each image's draws:

1. Sort images by id, so that the order of the rows changes nothing.
2. Draw the counts of a chunk of resamples from the seed.
3. Weight each image's hit, confidence or rank by its count.

The price: the area under the ROC curve is summed once per class and resample, so large splits get fewer resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, roc_auc_score, top_k_accuracy_score

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

TOP_K = 5
_LEVELS = (2.5, 97.5)
_CHUNK_BYTES = 2**27
# Class-by-image products that all resamples of the AUROC may take together: about a minute on one core.
_AUROC_BUDGET = 5e9
_FEWEST_RESAMPLES = 100


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of n images: their ids, labels, and the probability of each of its classes."""

    ids: Ints
    labels: Ints
    probabilities: Floats
    classes: tuple[str, ...]

    @property
    def predicted(self) -> Ints:
        """The most probable class of each image."""
        return self.probabilities.argmax(1)

    @property
    def present(self) -> Ints:
        """Classes that have at least one image, ascending."""
        return np.unique(self.labels)

    def by_id(self) -> "Predictions":
        """Return the same predictions in ascending order of id."""
        order = np.argsort(self.ids, kind="stable")
        return Predictions(self.ids[order], self.labels[order], self.probabilities[order], self.classes)


@dataclass(frozen=True)
class Interval:
    """A metric in percent; its 95 % interval over the resamples, absent if there are none."""

    value: float
    low: float | None = None
    high: float | None = None
    num_resamples: int = 0


@dataclass(frozen=True)
class Bins:
    """Images by confidence, in bins (low, high] of equal width; accuracy and confidence are means in a bin."""

    counts: Ints
    accuracy: Floats
    confidence: Floats


@dataclass(frozen=True)
class Metrics:
    """All metrics of one evaluation. `overall` lacks top5 below six classes, and auroc below two present ones."""

    overall: dict[str, Interval]
    class_accuracy: dict[str, float]
    class_auroc: dict[str, float]
    class_counts: dict[str, int]
    absent: list[str]
    """Classes without an image; no macro mean contains them."""
    confusion: Ints = field(repr=False)
    """Images by true class (row) and predicted class (column)."""
    bins: Bins = field(repr=False)


def measure(predictions: Predictions, *, num_bins: int, num_resamples: int, seed: int) -> Metrics:
    """Compute every metric. There must be at least one image."""
    found = predictions.by_id()
    labels, predicted, present, names = found.labels, found.predicted, found.present, found.classes
    everything = np.arange(len(names))
    # The stub of scikit-learn forbids None, which returns one value a class.
    recalls = np.asarray(recall_score(labels, predicted, labels=present, average=None))  # pyright: ignore[reportArgumentType]
    areas = _areas(found) if len(present) > 1 else np.zeros(0)
    bins = calibration_bins(predicted == labels, found.probabilities.max(1), num_bins)
    values = {"top1": accuracy_score(labels, predicted)}
    if len(names) > TOP_K:
        values["top5"] = top_k_accuracy_score(labels, found.probabilities, k=TOP_K, labels=everything)
    values["balanced_accuracy"] = recalls.mean()
    if len(areas):
        values["auroc"] = areas.mean()
    values["ece"] = calibration_error(bins)
    intervals = _bootstrap(found, num_bins, num_resamples, seed) if num_resamples else {}
    return Metrics(
        overall={name: _interval(value, intervals.get(name)) for name, value in values.items()},
        class_accuracy={names[c]: 100 * float(value) for c, value in zip(present, recalls)},
        class_auroc={names[c]: 100 * float(value) for c, value in zip(present, areas)},
        class_counts={names[c]: int((labels == c).sum()) for c in present},
        absent=[name for c, name in enumerate(names) if c not in set(present.tolist())],
        confusion=confusion_matrix(labels, predicted, labels=everything),
        bins=bins,
    )


def calibration_bins(correct: NDArray[np.bool_], confidence: Floats, num_bins: int) -> Bins:
    """Sort images into bins of equal width by confidence (Guo et al. 2017, section 2). Empty bins hold nan."""
    place = _bin_of(confidence, num_bins)
    counts = np.bincount(place, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return Bins(
            counts=counts,
            accuracy=np.bincount(place, correct, num_bins) / counts,
            confidence=np.bincount(place, confidence.astype(np.float64), num_bins) / counts,
        )


def calibration_error(bins: Bins) -> float:
    """Average the gap between accuracy and confidence over all images (ECE; Guo et al. 2017, equation 3)."""
    gaps = np.abs(bins.accuracy - bins.confidence)
    return float(np.nansum(gaps * bins.counts) / bins.counts.sum())


def _bin_of(confidence: Floats, num_bins: int) -> Ints:
    edges = np.linspace(0, 1, num_bins + 1)
    return np.searchsorted(edges[1:-1], confidence)


def _areas(found: Predictions) -> Floats:
    """Area under the ROC curve of each present class against all others."""
    return np.array([roc_auc_score(found.labels == c, found.probabilities[:, c]) for c in found.present])


def _interval(value: float, resampled: Floats | None) -> Interval:
    if resampled is None:
        return Interval(100 * float(value))
    low, high = np.nanpercentile(100 * resampled, _LEVELS)
    return Interval(100 * float(value), float(low), float(high), len(resampled))


def _bootstrap(found: Predictions, num_bins: int, num_resamples: int, seed: int) -> dict[str, Floats]:
    """Return each metric's values over the resamples, as shares."""
    labels, present = found.labels, found.present
    correct, confidence = found.predicted == labels, found.probabilities.max(1)
    best = np.argsort(found.probabilities, axis=1, kind="stable")[:, ::-1][:, :TOP_K]
    in_top = (best == labels[:, None]).any(1)
    place = _bin_of(confidence, num_bins)
    drawn: dict[str, list[Floats]] = {"top1": [], "top5": [], "balanced_accuracy": [], "ece": []}
    for counts in resamples(len(labels), num_resamples, seed):
        weights = counts.astype(np.float64)
        drawn["top1"].append(weights @ correct / len(labels))
        drawn["top5"].append(weights @ in_top / len(labels))
        drawn["balanced_accuracy"].append(_macro_recall(weights, labels, correct, present))
        gaps = [np.abs(np.bincount(place, w * (correct - confidence), num_bins)).sum() for w in weights]
        drawn["ece"].append(np.array(gaps) / len(labels))
    num_areas = min(num_resamples, int(_AUROC_BUDGET / max(1, len(labels) * len(present))))
    if len(present) > 1 and num_areas >= _FEWEST_RESAMPLES:
        drawn["auroc"] = [_macro_area(counts, found) for counts in resamples(len(labels), num_areas, seed)]
    return {name: np.concatenate(values) for name, values in drawn.items()}


def resamples(num_images: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Yield chunks [resamples images] of how often each image was drawn; resample i depends on seed and i alone."""
    size = max(1, _CHUNK_BYTES // (8 * num_images))
    for first in range(0, num_resamples, size):
        chunk = range(first, min(first + size, num_resamples))
        draws = (np.random.default_rng([seed, i]).integers(0, num_images, num_images) for i in chunk)
        yield np.stack([np.bincount(draw, minlength=num_images) for draw in draws]).astype(np.int32)


def _macro_recall(weights: Floats, labels: Ints, correct: NDArray[np.bool_], present: Ints) -> Floats:
    """Mean recall over the classes that each resample contains."""
    length = int(present[-1]) + 1
    hits = [np.bincount(labels, w * correct, length)[present] for w in weights]
    totals = [np.bincount(labels, w, length)[present] for w in weights]
    return _mean_of_defined(np.array(hits, np.float64), np.array(totals, np.float64))


def _macro_area(counts: NDArray[np.int32], found: Predictions) -> Floats:
    """Mean area under the ROC curve over the classes that each resample contains.

    A class's area is the weight of (image of the class, other image) pairs in the right order, ties counting half.
    """
    ordered, pairs = [], []
    for c in found.present:
        scores = found.probabilities[:, c]
        order = np.argsort(scores, kind="stable")
        ranked, is_class = scores[order], found.labels[order] == c
        others = counts[:, order] * ~is_class
        below = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(others, axis=1, dtype=np.float64)], axis=1)
        own, own_scores = counts[:, order][:, is_class], ranked[is_class]
        lower = below[:, np.searchsorted(ranked, own_scores, side="left")]
        upper = below[:, np.searchsorted(ranked, own_scores, side="right")]
        ordered.append((own * (lower + upper)).sum(1) / 2)
        pairs.append(own.sum(1) * below[:, -1])
    return _mean_of_defined(np.stack(ordered, axis=1), np.stack(pairs, axis=1))


def _mean_of_defined(parts: Floats, wholes: Floats) -> Floats:
    """Mean share of each row over the columns whose whole is not 0; nan if there is none."""
    shares = np.divide(parts, wholes, out=np.zeros(parts.shape), where=wholes > 0)
    num_defined = (wholes > 0).sum(1)
    return np.divide(shares.sum(1), num_defined, out=np.full(len(parts), np.nan), where=num_defined > 0)
