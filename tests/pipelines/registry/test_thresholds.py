"""Thresholds as MLflow judges them: bounds are inclusive, and what is not a number does not pass."""

import math

import pytest

from pipelines.registry import Threshold, unmet


@pytest.mark.parametrize(
    ("value", "bound", "is_least", "is_met"),
    [
        (1.0, 1.0, True, True),
        (0.99, 1.0, True, False),
        (-0.5, -1.0, True, True),
        (1.0, 1.0, False, True),
        (1.01, 1.0, False, False),
        (math.nan, -1e9, True, False),
        (math.nan, 1e9, False, False),
    ],
)
def test_a_bound_is_inclusive_and_nothing_but_a_number_meets_it(
    value: float, bound: float, is_least: bool, is_met: bool
) -> None:
    threshold = Threshold("figure", bound, is_least)
    assert unmet({"figure": value}, [threshold]) == ([] if is_met else [threshold])


def test_a_missing_figure_meets_nothing_and_only_what_is_unmet_is_returned() -> None:
    absent, met = Threshold("absent", 0, True), Threshold("there", 0, True)
    assert unmet({"there": 1}, [absent, met]) == [absent]
