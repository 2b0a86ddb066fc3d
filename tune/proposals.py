"""Points that Optuna's TPE proposes, round by round, as a pure function of the config and of what points reached."""

import math
from collections.abc import Callable
from typing import Any

from mae_core.errors import UserError
from pipelines.config import SweepConfig
from tune.space import Point, describe, parsed

_MAX_REPEATS = 20
"""Rounds without a new point after which the space counts as searched."""

Reached = Callable[[Point], float | None]
"""Accuracy of a point: None while it has not ended, and NaN if it has failed."""


def proposed(config: SweepConfig, reached: Reached) -> list[Point]:
    """Return the points of all rounds up to the first that has not ended, at most `num_trials`, each once.

    Steps, from the seed alone, so that a resumed search repeats itself:

    1. The sampler proposes `round_points` points: the first ones at random, then by a tree-structured Parzen estimator
       (Bergstra et al. 2011) of what earlier points reached.
    2. If one of them has not ended, all points so far are returned, to be run.
    3. Otherwise the sampler is told what they reached, and the next round begins.

    Raises UserError if optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("search tpe needs optuna, which is not installed; try pip install 'mae-ray[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    total = min(config.num_trials, math.prod(map(len, config.space.values())))
    sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=max(2, min(10, total // 3)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found: dict[str, Point] = {}
    repeats = 0
    while len(found) < total and repeats < _MAX_REPEATS:
        asked = [study.ask() for _ in range(config.round_points)]
        points = {trial.number: _point(trial, config.space) for trial in asked}
        num_before = len(found)
        for point in points.values():
            if len(found) < total and describe(point) not in found:
                found[describe(point)] = parsed(config, point)
        repeats = 0 if len(found) > num_before else repeats + 1
        known = [found.get(describe(points[trial.number])) for trial in asked]
        values = [None if point is None else reached(point) for point in known]
        if any(value is None for value in values):
            break
        for trial, value in zip(asked, values, strict=True):
            if value is None or math.isnan(value):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, value)
    return list(found.values())


def _point(trial: Any, space: dict[str, list[Any]]) -> Point:
    """Return the values that the sampler chooses: by their place if they are numbers in order, so that order counts."""
    point = {}
    for field, values in space.items():
        places = list(range(len(values)))
        is_ordered = all(isinstance(value, int | float) for value in values) and values == sorted(values)
        place = trial.suggest_int(field, 0, places[-1]) if is_ordered else trial.suggest_categorical(field, places)
        point[field] = values[place]
    return point
