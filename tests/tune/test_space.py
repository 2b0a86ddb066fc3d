"""Points are the space's, each once, in a stable order, and no mistake waits until a trial has started."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import PretrainConfig, SweepConfig
from tune.space import describe, points, value_text

SPACES = st.fixed_dictionaries(
    {},
    optional={
        "model.mask.ratio": st.lists(st.sampled_from([0.4, 0.5, 0.75, 0.9]), min_size=1, max_size=3, unique=True),
        "model.decoder_depth": st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True),
        "optim.base_lr": st.lists(st.sampled_from([1e-4, 1.5e-4, 1e-3]), min_size=1, max_size=3, unique=True),
    },
).filter(bool)

# A config is validated for every point of every example: few examples, and no clock on a busy machine.
few = settings(max_examples=8, deadline=None)


def sweep_of(space: dict[str, list[Any]], **fields: Any) -> SweepConfig:
    return SweepConfig(space=space, pretrain=PretrainConfig(epochs=100), **fields)


@few
@given(space=SPACES)
def test_a_grid_is_every_combination_once_the_last_field_fastest(space: dict[str, list[Any]]) -> None:
    expected = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    assert points(sweep_of(space)) == expected


@few
@given(space=SPACES, seed=st.integers(0, 2**31), num_trials=st.integers(1, 60))
def test_a_random_search_draws_distinct_points_of_the_grid(
    space: dict[str, list[Any]], seed: int, num_trials: int
) -> None:
    config = sweep_of(space, search="random", seed=seed, num_trials=num_trials)
    found = points(config)
    grid = points(sweep_of(space))
    assert len(found) == min(num_trials, math.prod(map(len, space.values())))
    assert all(point in grid and found.count(point) == 1 for point in found)
    assert points(config) == found


@few
@given(seed=st.integers(0, 2**31), fewer=st.integers(1, 11))
def test_more_random_trials_begin_with_the_fewer(seed: int, fewer: int) -> None:
    space = {"model.mask.ratio": [0.4, 0.5, 0.75, 0.9], "model.decoder_depth": [1, 4, 8]}
    begun = points(sweep_of(space, search="random", seed=seed, num_trials=fewer))
    assert points(sweep_of(space, search="random", seed=seed, num_trials=12))[:fewer] == begun


def test_seeds_draw_differently() -> None:
    space = {"seed": list(range(1000))}
    drawn = [
        describe(point) for s in (0, 1) for point in points(sweep_of(space, search="random", seed=s, num_trials=5))
    ]
    assert drawn[:5] != drawn[5:]


def test_a_random_search_never_builds_a_vast_grid() -> None:
    space = {"seed": list(range(10_000)), "optim.base_lr": [1e-4 * i for i in range(1, 10_000)]}
    assert len(points(sweep_of(space, search="random", num_trials=3))) == 3


def test_values_are_those_that_pretraining_takes() -> None:
    """PyYAML reads 1e-3 as a string."""
    assert points(sweep_of({"optim.base_lr": ["1e-3"]})) == [{"optim.base_lr": 0.001}]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.mask.ratoi": [0.5]}, "unknown field 'model.mask.ratoi' in space; did you mean model.mask.ratio"),
        ({"mask.ratio": [0.5]}, "did you mean model.mask.ratio"),
        ({"decoder_depth": [1]}, "did you mean model.decoder_depth"),
        ({"zzz": [1]}, "mae config pretrain"),
        ({"model.mask.ratio": [0.5, 1.5]}, "space point model.mask.ratio=1.5: .*outside"),
        ({"model.decoder_depth": [1, "deep"]}, "space point model.decoder_depth=deep: .*got 'deep'"),
        ({"model.mask.ratio": [0.5, 0.5]}, "are the same trial"),
        ({"compute.num_workers": [1, 2]}, "are the same trial"),
    ],
)
def test_a_mistake_in_the_space_is_refused_in_words(space: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points(sweep_of(space))


def test_values_are_written_in_few_characters() -> None:
    assert [value_text(v) for v in (0.75, 4, "block", True, {"kind": "grid", "ratio": 0.75})] == [
        "0.75",
        "4",
        "block",
        "true",
        "{kind:grid,ratio:0.75}",
    ]
