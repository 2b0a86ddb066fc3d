"""Two models on the same images: intervals are paired, and equal models differ by nothing."""

import numpy as np
import pytest

from pipelines.evaluation.gains import Metric, compare

LABELS = np.array(["a"] * 30 + ["b"] * 60 + ["c"] * 10)


def shares(seed: int, mean: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(LABELS)) < mean).astype(np.float64)


@pytest.mark.parametrize("metric", ["top1", "balanced_accuracy"])
def test_equal_models_gain_and_lose_nothing_in_any_resample(metric: Metric) -> None:
    same = shares(0, 0.7)
    found = compare(LABELS, same, same, metric=metric, num_resamples=200, seed=0)
    assert found.gain is not None
    assert (found.gain.value, found.gain.low, found.gain.high) == (0, 0, 0)
    assert {(loss.value, loss.low, loss.high) for loss in found.losses.values()} == {(0, 0, 0)}


def test_the_gain_is_the_difference_of_the_metrics_and_lies_in_its_interval() -> None:
    ours, theirs = shares(1, 0.9), shares(2, 0.6)
    recall = [100 * (ours - theirs)[name == LABELS].mean() for name in "abc"]
    for metric, expected in {"top1": 100 * (ours - theirs).mean(), "balanced_accuracy": np.mean(recall)}.items():
        found = compare(LABELS, ours, theirs, metric=metric, num_resamples=500, seed=0)  # pyright: ignore[reportArgumentType]
        assert found.gain is not None
        assert found.champion is not None
        assert found.gain.value == pytest.approx(expected)
        assert found.gain.value == pytest.approx(found.candidate.value - found.champion.value)
        assert found.gain.low is not None
        assert found.gain.high is not None
        assert 0 < found.gain.low < found.gain.value < found.gain.high


def test_pairing_narrows_the_interval_where_both_find_the_same_images_hard() -> None:
    theirs = shares(3, 0.5)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[:5]] = 1
    found = compare(LABELS, ours, theirs, metric="top1", num_resamples=500, seed=0)

    def width(interval: object) -> float:
        return interval.high - interval.low  # pyright: ignore[reportAttributeAccessIssue]

    assert width(found.gain) < width(found.candidate) / 2


def test_a_class_that_is_lost_is_the_worst_and_a_class_of_few_images_gets_a_wide_interval() -> None:
    theirs = np.ones(len(LABELS))
    ours = theirs.copy()
    ours[:15] = 0
    ours[-5:] = 0
    found = compare(LABELS, ours, theirs, metric="top1", num_resamples=500, seed=0)
    assert found.losses["a"].value == found.losses["c"].value == pytest.approx(50)
    low = {name: loss.low or 0.0 for name, loss in found.losses.items()}
    assert found.worst_class == "a"
    assert low["c"] < low["a"] < 50
    assert found.losses["b"].value == 0


def test_without_a_champion_there_is_a_value_and_no_gain() -> None:
    found = compare(LABELS, shares(0, 0.7), None, metric="top1", num_resamples=100, seed=0)
    assert found.candidate.value == pytest.approx(100 * shares(0, 0.7).mean())
    assert (found.champion, found.gain, found.losses, found.worst_class) == (None, None, {}, "")
