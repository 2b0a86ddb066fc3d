"""Successive halving: the worst trials are asked to stop, and a restarted search remembers those that have ended."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mae_core.errors import UserError
from pipelines.config import PretrainConfig, SweepConfig
from pipelines.config.evaluating import PeriodicEvaluationConfig
from tune.halving import Halving, Rungs, rungs_of
from tune.results import measured_points
from tune.summary import table

RUNGS = Rungs(first_epoch=1, factor=2, epochs=8)
ACCURACIES = {"a": 40.0, "b": 30.0, "c": 45.0, "d": 35.0}


def searched(rungs: Rungs, ended: list[str], at_work: list[str]) -> list[str]:
    """Return which trials at work are asked to stop: each reports its accuracy at every epoch, one after the other."""
    stopped: list[str] = []
    halving = Halving(rungs, lambda config: stopped.append(config["name"]))
    for name in ended:
        halving.replay(name, [(epoch, ACCURACIES[name]) for epoch in range(1, rungs.epochs)])
    for name in at_work:
        trial: Any = SimpleNamespace(trial_id=name, config={"name": name})
        controller: Any = None
        halving.on_trial_add(controller, trial)
        for epoch in range(1, rungs.epochs):
            action = halving.on_trial_result(controller, trial, {"epoch": epoch, "online": ACCURACIES[name]})
            assert action == "CONTINUE", "Tune kills no trial; it ends by itself"
            if name in stopped:
                break
        halving.on_trial_complete(controller, trial, {"done": True})
    return stopped


def test_trials_below_the_better_half_of_those_before_are_asked_to_stop() -> None:
    assert searched(RUNGS, [], ["a", "b", "c", "d"]) == ["b", "d"]
    assert searched(RUNGS, [], ["b", "d", "a", "c"]) == [], "each is the best so far"


def test_a_restarted_search_decides_as_one_that_was_not_interrupted() -> None:
    assert searched(RUNGS, ["a", "b", "c"], ["d"]) == ["d"]
    assert searched(RUNGS, ["a"], ["b", "c", "d"]) == ["b", "d"]


def test_a_larger_factor_lets_fewer_go_on() -> None:
    order = ["b", "c", "a"]
    assert searched(RUNGS, [], order) == []
    assert searched(dataclasses.replace(RUNGS, factor=8), [], order) == ["a"]


def asha(**fields: Any) -> SweepConfig:
    pretrain = PretrainConfig(epochs=100, evaluate=PeriodicEvaluationConfig(every_epochs=10))
    return SweepConfig(**{"early_stop": "asha", "pretrain": pretrain, **fields})


def test_rungs_begin_at_the_first_evaluation() -> None:
    assert rungs_of(asha(asha_factor=4)) == Rungs(first_epoch=10, factor=4, epochs=100)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"pretrain": PretrainConfig(epochs=90)}, "every-epochs 10"),
        ({"search": "tpe"}, "--search random"),
        ({"space": {"epochs": [10, 20]}}, "leave epochs out"),
        ({"trials_per_group": 4}, "try 1"),
        ({"asha_factor": 1}, "try 3"),
    ],
)
def test_what_halving_cannot_compare_is_refused_with_a_remedy(fields: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        asha(**fields)


def test_a_stopped_point_has_a_row_and_no_accuracy() -> None:
    common = {"kind": "mae", "seed": 0, "visible": 12, "patches": 49, "duration_s": 60.0, "error": "", "loss": 0.5}
    best = {**common, "key": "x", "point": {"model.decoder_depth": 1}, "probe": 40.0, "finetune": 60.0}
    none = {"probe": None, "finetune": None, "loss": None, "stopped": {"epoch": 3, "online": 31.25}}
    worst = {**common, "key": "y", "point": {"model.decoder_depth": 4}, **none}
    entries = json.loads(json.dumps([best, worst]))
    assert [measured.point for measured in measured_points(entries)] == [{"model.decoder_depth": 1}]
    assert table(entries, "x").splitlines()[2].split() == ["4", "12/49", "stopped", "epoch", "3"]
