"""What is said of measured times."""

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.bench.timing import interleaved, median_interval, ratio, spread

CPU = torch.device("cpu")


def test_every_action_is_timed_once_per_round_in_rotating_order():
    now, calls = [0.0], []

    def action(name: str, takes_s: float):
        def run() -> None:
            calls.append(name)
            now[0] += takes_s

        return run

    found = interleaved([action("a", 2.0), action("b", 3.0), action("c", 5.0)], 2, CPU, lambda: now[0])
    assert "".join(calls) == "abcbca"
    assert found.tolist() == [[2, 2], [3, 3], [5, 5]]


@given(num=st.integers(6, 200))
def test_the_median_interval_covers_95_percent_and_the_next_narrower_does_not(num):
    low, high = median_interval(np.arange(num, dtype=float))
    assert low + high == num - 1

    def outside(below: float) -> float:
        return 2 * sum(comb(num, i) for i in range(int(below) + 1)) / 2**num

    assert outside(low) <= 0.05 < outside(low + 1)


def test_the_median_interval_of_thirty_values_is_the_textbooks():
    assert median_interval(np.random.default_rng(0).permutation(30.0 + np.arange(30))) == (39.0, 50.0)


def test_a_slow_round_does_not_change_the_ratio():
    ours = np.array([1.0] * 10 + [40.0])
    found = ratio(1.5 * ours, ours)
    assert (found.of_medians, found.low, found.high) == (1.5, 1.5, 1.5)


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert spread(np.array([8.0, 9.0, 10.0, 11.0, 12.0])) == pytest.approx(0.2)
