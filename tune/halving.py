"""Early stopping by successive halving: a trial ends if its online probe is among the worst at its epoch.

Ray Tune's ASHA (Li et al. 2018, arXiv 1810.05934) decides. A trial that it stops is not killed: it is asked to save a
checkpoint and end, as at a signal, and the ledger records it. A restarted sweep replays what ended trials reported.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from pipelines.config import SweepConfig
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.metrics import Evaluations
from pipelines.runs.plans import train_plan
from tune.trial import Trial

log = logging.getLogger(__name__)

ACCURACY = "evaluate/linear_top1"
_EPOCH, _ONLINE = "epoch", "online"
_POLL_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Epochs at which trials are compared: the first, and each by `factor` later than the one before."""

    first_epoch: int
    factor: int
    epochs: int
    """Epochs of a whole pretraining."""


def rungs_of(config: SweepConfig) -> Rungs:
    """Return the rungs of the sweep: its first evaluation while pretraining, and multiples of it."""
    pretrain = config.pretrain
    return Rungs(first_epoch=pretrain.evaluate.every_epochs, factor=config.asha_factor, epochs=pretrain.epochs)


@dataclass(frozen=True)
class _Replayed:
    """What ASHA asks of a trial that has ended: its id."""

    trial_id: str


class Halving(ASHAScheduler):
    """Ask the worst trials to stop: at each rung, one in `factor` goes on, by those that reached it before.

    Pickled empty, as the search's callback: Tune pickles it to restore a search, which we never do.
    """

    def __init__(self, rungs: Rungs, stop: Callable[[Any], None]) -> None:
        """`stop` is called with the trial's config, to ask the trial to stop; it may be called again."""
        super().__init__(
            time_attr=_EPOCH,
            metric=_ONLINE,
            mode="max",
            max_t=rungs.epochs,
            grace_period=rungs.first_epoch,
            reduction_factor=rungs.factor,
            stop_last_trials=False,
        )
        self._stop = stop

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def replay(self, name: str, points: Sequence[tuple[int, float]]) -> None:
        """Take into account what a trial reported that has ended: epochs, each with the accuracy."""
        ended: Any = _Replayed(name)
        controller: Any = None
        self.on_trial_add(controller, ended)
        for epoch, accuracy in points:
            super().on_trial_result(controller, ended, {_EPOCH: epoch, _ONLINE: accuracy})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask the trial to stop if it is among the worst. Tune itself lets it go on until it has ended."""
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._stop(trial.config)
        return TrialScheduler.CONTINUE


def online_accuracies(trial: Trial) -> list[tuple[int, float]]:
    """Return the epochs before the last one whose weights were evaluated while pretraining, each with the accuracy.

    The accuracy is that of the linear probe, in percent.
    """
    job = trial.pretrain
    if job is None:
        return []
    found = Evaluations(RunFolder(job.folder).storage)
    values = [(_epoch(job, trial, step), found.read(step).get(ACCURACY)) for step in found.steps()]
    return [(epoch, value) for epoch, value in values if value is not None and epoch < job.config.epochs]


def _epoch(job: PretrainJob, trial: Trial, step: int) -> int:
    num_steps = job.config.reading.epochs * train_plan(job, trial.datasets["pretrain"]).steps_per_epoch
    return round(job.config.epochs * step / num_steps)


@contextmanager
def reporting(trial: Trial) -> Iterator[None]:
    """Report each evaluation of the trial's pretraining to Tune while the block runs, in the trial's driver."""
    has_ended = threading.Event()

    def report() -> None:
        reported = 0
        while not has_ended.wait(_POLL_EVERY_S):
            try:
                for epoch, accuracy in online_accuracies(trial)[reported:]:
                    tune.report({_EPOCH: epoch, _ONLINE: accuracy})
                    reported += 1
            except OSError as error:
                log.warning("evaluations could not be read, retrying in %g s: %s", _POLL_EVERY_S, error)

    thread = threading.Thread(target=report, name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
