"""TPE's proposals follow from the config and from what points reached, and they find what is good."""

import itertools
import math
from typing import Any

import pytest

from pipelines.config import PretrainConfig, SweepConfig
from tune.space import Point

pytest.importorskip("optuna", reason="needs optuna; pip install '.[search]' brings it")

from tune.proposals import proposed

SPACE: dict[str, list[Any]] = {
    "model.mask.ratio": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "model.decoder_depth": [1, 2, 3, 4, 6, 8, 12],
    "model.target": ["pixels", "norm_pixels"],
}


def sweep_of(**fields: Any) -> SweepConfig:
    return SweepConfig(**{"space": SPACE, "search": "tpe", "num_trials": 24, "pretrain": PretrainConfig(), **fields})


def accuracy(point: Point) -> float:
    """Best at 70 % and depth 8, and better with normalized pixels."""
    depth = abs(math.log2(point["model.decoder_depth"]) - 3)
    return 80 - 40 * abs(point["model.mask.ratio"] - 0.7) - 3 * depth + 5 * (point["model.target"] == "norm_pixels")


def run_all(config: SweepConfig) -> list[list[Point]]:
    """Return the points after each round, all of which end in time."""
    rounds: list[list[Point]] = [[]]
    while True:
        found = proposed(config, lambda point: accuracy(point) if point in rounds[-1] else None)
        if found == rounds[-1]:
            return rounds[1:]
        rounds.append(found)


def test_rounds_continue_those_before_and_end_with_the_number_of_trials() -> None:
    rounds = run_all(sweep_of())
    assert len(rounds[0]) == 4
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(rounds))
    last = rounds[-1]
    assert len(last) == 24
    assert all(last.count(point) == 1 for point in last)
    assert proposed(sweep_of(), accuracy) == last, "a resumed search proposes the same"
    assert proposed(sweep_of(seed=1), accuracy) != last


def test_later_proposals_are_better_than_the_first() -> None:
    means = []
    for seed in range(4):
        last = [accuracy(point) for point in proposed(sweep_of(seed=seed), accuracy)]
        means.append((sum(last[:8]) / 8, sum(last[-8:]) / 8))
    assert sum(late for _, late in means) / 4 > sum(early for early, _ in means) / 4 + 3


def test_a_failed_point_is_not_run_again_and_ends_nothing() -> None:
    config = sweep_of(num_trials=12)
    found = proposed(config, lambda point: math.nan if point["model.target"] == "pixels" else accuracy(point))
    assert len(found) == 12


def test_a_small_space_is_proposed_as_a_whole() -> None:
    config = sweep_of(space={"model.target": ["pixels", "norm_pixels"]}, num_trials=10)
    found = proposed(config, lambda point: 1.0)
    assert sorted(point["model.target"] for point in found) == ["norm_pixels", "pixels"]


def test_values_are_those_that_pretraining_takes() -> None:
    found = proposed(sweep_of(space={"optim.base_lr": ["1e-3"]}), lambda point: None)
    assert found == [{"optim.base_lr": 0.001}]
