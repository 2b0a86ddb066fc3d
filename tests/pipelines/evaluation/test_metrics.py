"""Metrics equal scikit-learn's, depend on no order, and their intervals on nothing but the seed."""

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Metrics, Predictions, calibration_bins, measure


def draw(num_images: int = 300, num_classes: int = 7, present: int | None = None, seed: int = 0) -> Predictions:
    """Predictions that are right more often than not; with `present`, only the first classes have images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or num_classes, num_images)
    logits = rng.normal(size=(num_images, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = tuple(f"class {i}" for i in range(num_classes))
    return Predictions(rng.permutation(num_images), labels, probabilities.astype(np.float32), names)


def measured(predictions: Predictions, num_resamples: int = 0, seed: int = 0) -> Metrics:
    return measure(predictions, num_bins=15, num_resamples=num_resamples, seed=seed)


def value(found: Metrics, name: str) -> float:
    return found.overall[name].value / 100


def test_a_perfect_classifier_has_100_percent_of_everything() -> None:
    labels = np.arange(60) % 6
    sure = Predictions(np.arange(60), labels, np.eye(6, dtype=np.float32)[labels], tuple("abcdef"))
    found = measured(sure, num_resamples=100)
    for name in ("top1", "top5", "balanced_accuracy", "auroc"):
        interval = found.overall[name]
        assert (interval.value, interval.low, interval.high) == (100, 100, 100)
    assert found.overall["ece"].value == 0
    assert set(found.class_accuracy.values()) == {100}
    assert (found.confusion == np.diag([10] * 6)).all()


def test_values_equal_scikit_learns() -> None:
    drawn = draw()
    found, predicted = measured(drawn), drawn.predicted
    assert value(found, "top1") == pytest.approx(sk.accuracy_score(drawn.labels, predicted))
    assert value(found, "top5") == pytest.approx(sk.top_k_accuracy_score(drawn.labels, drawn.probabilities, k=5))
    assert value(found, "balanced_accuracy") == pytest.approx(sk.balanced_accuracy_score(drawn.labels, predicted))
    area = sk.roc_auc_score(drawn.labels, drawn.probabilities.astype(np.float64), multi_class="ovr", average="macro")
    assert value(found, "auroc") == pytest.approx(area)
    assert sum(found.class_counts.values()) == found.confusion.sum() == len(drawn.labels)


def test_calibration_bins_are_those_of_scikit_learns_curve() -> None:
    drawn = draw()
    correct, confidence = drawn.predicted == drawn.labels, drawn.probabilities.max(1)
    bins = calibration_bins(correct, confidence, 15)
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=15)
    filled = bins.counts > 0
    assert bins.counts.sum() == len(correct)
    np.testing.assert_allclose(bins.accuracy[filled], accuracy)
    np.testing.assert_allclose(bins.confidence[filled], mean_confidence)


def test_one_bin_makes_the_calibration_error_the_gap_of_the_means() -> None:
    drawn = draw()
    gap = (drawn.predicted == drawn.labels).mean() - drawn.probabilities.max(1).astype(np.float64).mean()
    found = measure(drawn, num_bins=1, num_resamples=0, seed=0)
    assert value(found, "ece") == pytest.approx(abs(gap))


def test_the_order_of_rows_changes_nothing() -> None:
    drawn = draw()
    order = np.random.default_rng(1).permutation(len(drawn.ids))
    mixed = Predictions(drawn.ids[order], drawn.labels[order], drawn.probabilities[order], drawn.classes)
    assert measured(mixed, num_resamples=100).overall == measured(drawn, num_resamples=100).overall


def test_classes_without_images_are_named_and_no_mean_contains_them() -> None:
    found, whole = measured(draw(present=4)), draw(present=4)
    assert found.absent == ["class 4", "class 5", "class 6"]
    assert list(found.class_accuracy) == ["class 0", "class 1", "class 2", "class 3"]
    assert found.overall["balanced_accuracy"].value == pytest.approx(np.mean(list(found.class_accuracy.values())))
    assert found.overall["auroc"].value == pytest.approx(np.mean(list(found.class_auroc.values())))
    assert found.confusion.shape == (7, 7)
    assert found.overall["top1"].value == pytest.approx(100 * (whole.predicted == whole.labels).mean())


def test_metrics_that_say_nothing_are_left_out() -> None:
    assert "top5" not in measured(draw(num_classes=5)).overall
    assert "top5" in measured(draw(num_classes=6)).overall
    assert "auroc" not in measured(draw(present=1)).overall


def test_two_classes_have_one_area() -> None:
    drawn = draw(num_classes=2)
    found = measured(drawn)
    area = sk.roc_auc_score(drawn.labels, drawn.probabilities[:, 1])
    assert list(found.class_auroc.values()) == pytest.approx([100 * area, 100 * area])


def test_intervals_depend_on_the_seed_alone_and_hold_the_value() -> None:
    drawn = draw()
    found, again, other = (measured(drawn, 200, seed) for seed in (0, 0, 1))
    assert found.overall == again.overall != other.overall
    for name in ("top1", "top5", "balanced_accuracy", "auroc"):
        interval = found.overall[name]
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.value < interval.high


def test_a_resample_is_measured_as_if_its_images_were_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(num_images=80).by_id()
    # Few values, so that scores tie.
    drawn = Predictions(drawn.ids, drawn.labels, drawn.probabilities.round(1), drawn.classes)
    resampled = metrics._bootstrap(drawn, num_bins=15, num_resamples=100, seed=3)
    rows = np.random.default_rng([3, 42]).integers(0, 80, 80)
    split = Predictions(np.arange(80), drawn.labels[rows], drawn.probabilities[rows], drawn.classes)
    expected = measured(split)
    for name in ("top1", "balanced_accuracy", "auroc", "ece"):
        assert resampled[name][42] == pytest.approx(value(expected, name)), name
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 1)
    for name, chunked in metrics._bootstrap(drawn, num_bins=15, num_resamples=100, seed=3).items():
        np.testing.assert_allclose(chunked, resampled[name])


def test_a_split_too_large_to_resample_has_an_area_without_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw()
    monkeypatch.setattr(metrics, "_AUROC_BUDGET", 99 * 300 * 7)
    assert measured(drawn, 200).overall["auroc"].low is None
    monkeypatch.setattr(metrics, "_AUROC_BUDGET", 150 * 300 * 7)
    assert measured(drawn, 200).overall["auroc"].num_resamples == 150
