"""Means have honest intervals, the best is chosen over seeds, and importance is an analysis of variance."""

import itertools
from typing import Any

import pytest

from tune.results import (
    Entry,
    baseline_of,
    best_of,
    importance,
    interval,
    measured_baselines,
    measured_points,
    varied_fields,
    what_intervals_are,
)


def entry(point: dict[str, Any], finetune: float, probe: float = 50.0, seed: int = 0, **more: Any) -> Entry:
    key = f"{point}-{seed}-{more.get('kind')}"
    return {
        "key": key, "kind": "mae", "point": point, "seed": seed, "visible": 12, "patches": 49, "probe": probe,
        "finetune": finetune, "loss": 0.5, "duration_s": 60.0, "error": "", **more,
    }  # fmt: skip


def test_an_interval_is_students_t_and_needs_two_values() -> None:
    found = interval([70.0, 71.0, 72.0])
    assert found.mean == 71.0
    # 4.3027 is the 97.5 % quantile of t with two degrees of freedom, and the deviation is 1.
    assert found.high - found.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert str(found) == "71.00 ± 2.48"
    assert str(interval([71.0])) == "71.00"


def test_the_best_point_is_that_of_the_best_mean_and_its_first_seed_stands_for_it() -> None:
    lucky = [entry({"a": 1}, value, seed=i) for i, value in enumerate((60.0, 90.0))]
    steady = [entry({"a": 2}, value, seed=i) for i, value in enumerate((78.0, 77.0))]
    best = best_of([*lucky, *steady], "finetune")
    assert (best["point"], best["seed"]) == ({"a": 2}, 0)


def test_neither_failed_trials_nor_baselines_are_points() -> None:
    entries = [
        entry({"a": 1}, 70.0),
        entry({"a": 2}, 99.0, error="loss is nan"),
        entry({}, 98.0, kind="scratch"),
    ]
    assert [measured.point for measured in measured_points(entries)] == [{"a": 1}]
    assert best_of(entries, "finetune")["point"] == {"a": 1}
    [baseline] = measured_baselines(entries)
    assert baseline.of("finetune").mean == 98.0


def test_a_baseline_has_the_labels_of_its_point() -> None:
    shares = [entry({"finetune.labels": share}, 10.0, kind="scratch") for share in ("1%", "10%")]
    found = baseline_of({"finetune.labels": "10%", "a": 1}, measured_baselines(shares))
    assert found is not None
    assert found.point == {"finetune.labels": "10%"}
    assert baseline_of({"a": 1}, measured_baselines(shares)) is None


def test_importance_is_the_share_of_each_field_and_sums_to_the_whole_on_a_grid() -> None:
    noise = {0: -0.5, 1: 0.5}
    entries = [
        entry({"a": a, "b": b, "c": "same"}, 60 + 10 * a + 2 * b + noise[seed], seed=seed)
        for a, b, seed in itertools.product((0, 1), (0, 1), (0, 1))
    ]
    points = measured_points(entries)
    assert varied_fields(points) == ["a", "b"]
    # Sums of squares: 8 * 25 for a, 8 * 1 for b, 8 * 0.25 for the seed, none for both together.
    shares = importance(points, "finetune")
    assert shares == pytest.approx({"a": 20000 / 210, "b": 800 / 210, "seed": 200 / 210, "together": 0.0})


def test_what_only_two_fields_explain_together_is_told_apart() -> None:
    entries = [entry({"a": a, "b": b}, 60.0 + (a ^ b)) for a, b in itertools.product((0, 1), (0, 1))]
    assert importance(measured_points(entries), "finetune") == pytest.approx({"a": 0, "b": 0, "together": 100})


def test_trials_that_agree_leave_nothing_to_explain() -> None:
    assert importance(measured_points([entry({"a": a}, 70.0) for a in (1, 2)]), "finetune") == {}


def test_one_seed_has_the_interval_of_its_images() -> None:
    """Wilson's interval of 320 in 600, computed by hand from its formula."""
    entries = [entry({"x": 1}, 53.333, 53.333, num_val={"probe": 600, "finetune": 600})]
    (measured,) = measured_points(entries)
    found = measured.drawn("finetune", over_seeds=False)
    assert (found.low, found.high) == pytest.approx((49.333, 57.291), abs=0.01)
    assert measured.drawn("finetune", over_seeds=True) == interval([53.333])
    assert what_intervals_are([measured]).startswith("Bars are 95 % intervals of accuracies on 600 images of val")
    assert str(measured.of("finetune")) == "53.33"
    old = measured_points([entry({"x": 1}, 53.333, 53.333)])
    assert old[0].drawn("finetune", over_seeds=False) == interval([53.333])
    assert what_intervals_are(old) == ""


def test_several_seeds_have_the_interval_over_them() -> None:
    entries = [entry({"x": 1}, 60.0, 50.0 + s, s, num_val={"probe": 600, "finetune": 600}) for s in range(3)]
    (measured,) = measured_points(entries)
    assert measured.drawn("probe", over_seeds=True) == interval([50.0, 51.0, 52.0])
    assert what_intervals_are([measured]) == "Bars are 95 % intervals over seeds."
