"""Run the trials with Ray Tune, and mirror each to a child run in MLflow from start to end."""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ray.tune import Callback, Stopper

from pipelines import registry
from pipelines.cluster import quiet_ray
from pipelines.config import to_dict
from pipelines.drivers.drive import mark_interrupted
from pipelines.interrupts import die_of_sigterm, wait_for
from pipelines.registry import Point
from pipelines.runs.automatic import settled_config
from pipelines.runs.folder import RunFolder
from pipelines.runs.followers import EvaluationFollower, MetricFollower, PictureFollower
from pipelines.runs.stopping import StopRequest
from tune.budget import Budget
from tune.halving import Halving, Rungs, online_accuracies, reporting
from tune.trial import CLOSED, MEASURES, Trial, is_stopped, run

log = logging.getLogger(__name__)

_PREFIXES = {"pretrain": "", "probe": "probe/", "finetune": "finetune/"}
_ENVIRONMENT = {
    # Turn off Tune's tables, loggers and hints: we report with our table, MLflow and the log.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # The last report of a trial has no metric for the scheduler.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def search(
    groups: Sequence[Sequence[Trial]],
    children: "Children",
    max_concurrent: int,
    budget: Budget | None = None,
    *,
    rungs: Rungs | None = None,
    ended: Sequence[Trial] = (),
) -> None:
    """Run every trial, at most `max_concurrent` groups at a time, and record each in the ledger and MLflow.

    Groups that the budget does not cover are not started; those at work when it ends save their checkpoints and stop.
    With `rungs`, so do those that ASHA stops, by what they and the `ended` trials reported while pretraining.

    Tune's own state is discarded because the ledger replaces it: a restarted sweep is a new search over the unfinished
    trials. Raises Interrupted after a signal, once the groups at work have saved their checkpoints, or compute.grace_s
    is over.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    from ray import tune

    quiet_ray()
    request, watch = StopRequest.new(), _Watch(groups, children)
    grace_s = max(trial.main.config.compute.grace_s for group in groups for trial in group)

    def stop() -> float:
        watch.is_stopping = True
        return request.make_and_allow(grace_s)

    requests = [request.for_some() for _ in groups]
    halving = Halving(rungs, lambda config: requests[config["group"]].make()) if rungs else None
    if halving:
        for trial in {trial.main.folder: trial for trial in ended}.values():
            halving.replay(trial.main.folder, online_accuracies(trial))
    run_group = tune.with_parameters(
        _run_group, groups=groups, requests=requests, budget=budget, is_halving=halving is not None
    )
    with tempfile.TemporaryDirectory(prefix="mae-tune-") as scratch, children, _at_end_of(budget, stop):
        tuner = tune.Tuner(
            # A trial's driver only waits for its worker group, which requests CPUs itself. Tune refuses an empty
            # request, so the driver requests one byte of memory.
            tune.with_resources(run_group, {"CPU": 0, "memory": 1}),
            param_space={"group": tune.grid_search(list(range(len(groups))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, reuse_actors=True, scheduler=halving),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[watch], stop=_Stop(watch)
            ),
        )
        wait_for(tuner.fit, stop)


def _run_group(
    config: dict[str, Any],
    groups: Sequence[Sequence[Trial]],
    requests: Sequence[StopRequest],
    budget: Budget | None,
    is_halving: bool,
) -> dict[str, Any]:
    quiet_ray()
    group, request = groups[config["group"]], requests[config["group"]]

    def stopped() -> dict[str, Any] | None:
        return dict(zip(("epoch", "online"), online_accuracies(group[0])[-1])) if request.is_made_alone() else None

    try:
        if not request.is_made() and (budget is None or budget.covers(group)):
            with reporting(group[0]) if is_halving else nullcontext():
                run(group, request, stopped)
    finally:
        die_of_sigterm()  # Tune may end its actor so.
    return {"done": True}


@contextmanager
def _at_end_of(budget: Budget | None, stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` on a thread when the budget ends, unless the block has ended."""
    if budget is None:
        yield
        return
    timer = threading.Timer(max(0.0, budget.rest_s), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Watch(Callback):
    """Report each group's start and end to the driver.

    Pickled empty: Tune pickles it to restore a search, which we never do.
    """

    is_stopping: bool
    """Whether the driver has asked the groups to stop. Unfinished trials then stay open in MLflow until they are marked
    as killed, and groups that Tune starts do nothing."""

    def __init__(self, groups: Sequence[Sequence[Trial]], children: "Children") -> None:
        self._groups, self._children = groups, children
        self.is_stopping = False
        self._at_work: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @property
    def has_stopped(self) -> bool:
        """Whether the groups were asked to stop, and none is at work any more."""
        return self.is_stopping and not self._at_work

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.is_stopping:
            return
        self._at_work.add(trial.config["group"])
        for one in self._groups[trial.config["group"]]:
            self._children.open(one)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._at_work.discard(trial.config["group"])
        for one in self._groups[trial.config["group"]]:
            # Without an entry it was stopped, or never started because the budget does not cover it.
            if one.entry() is not None and (one.is_finished() or not self.is_stopping):
                self._children.close(one)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._at_work.discard(trial.config["group"])
        if self.is_stopping:
            return
        # The group's driver process died before it could record a result.
        for one in self._groups[trial.config["group"]]:
            if not one.is_finished():
                one.record("the trial's driver process died; check whether memory ran out")
            self._children.close(one)


class _Stop(Stopper):
    """End the search once the groups that were asked to stop have done so. Pickled empty, as `_Watch`."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._watch.has_stopped


@dataclass(frozen=True)
class Prefixed:
    """An MLflow run in which one job of a trial logs points under its own prefix."""

    run: registry.Run
    prefix: str

    @property
    def num_waiting(self) -> int:
        """Number of points that MLflow has not confirmed."""
        return self.run.num_waiting

    def last_steps(self) -> dict[str, int]:
        """Return the last stored step of the job's metrics, by name without the prefix."""
        found = self.run.last_steps().items()
        return {key.removeprefix(self.prefix): step for key, step in found if key.startswith(self.prefix)}

    def log_points(self, points: Sequence[Point]) -> None:
        """Queue the points, named with the prefix."""
        self.run.log_points([point._replace(key=self.prefix + point.key) for point in points])


class Children:
    """The trials' MLflow runs, children of the sweep's run.

    Each is opened, followed while its trial runs, and closed.
    """

    def __init__(self, tracking: registry.Tracking, parent: registry.Run, trials: Sequence[Trial]) -> None:
        self._tracking, self._parent = tracking, parent
        self._number = {trial.key: i for i, trial in enumerate(trials, 1)}
        self._open: dict[str, tuple[registry.Run, ExitStack]] = {}

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *failure: object) -> None:
        """Mark the runs of interrupted trials as killed."""
        for child, following in self._open.values():
            following.close()
            if isinstance(failure[1], KeyboardInterrupt):
                mark_interrupted(child, "the sweep stopped")
            else:
                child.finish("KILLED")
        self._open.clear()

    def name(self, trial: Trial) -> str:
        """Return the trial's name in MLflow."""
        return f"{self._parent.name}/{trial.key}"

    def open(self, trial: Trial) -> None:
        """Find or create the trial's run, and start copying what its jobs report to it."""
        if trial.key in self._open:
            return
        config = trial.main.config
        child = self._tracking.run(
            self.name(trial),
            "trial",
            to_dict(settled_config(trial.main)),
            tags={
                "mae.folder": trial.folder,
                "mae.point": json.dumps(trial.point),
                "mae.seed": str(trial.seed),
                "mae.pretrained": str(trial.pretrain is not None).lower(),
            },
            dataset=trial.manifest,
            dataset_uri=config.data.uri,
            parent=self._parent,
            key=trial.claim(),
        )
        following = ExitStack()
        for name, job in trial.jobs.items():
            storage = RunFolder(job.folder).storage
            following.enter_context(MetricFollower(storage, Prefixed(child, _PREFIXES[name])))
        if trial.pretrain is not None:
            storage = RunFolder(trial.pretrain.folder).storage
            following.enter_context(PictureFollower(storage, child))
            if trial.pretrain.config.evaluate.every_epochs:
                following.enter_context(EvaluationFollower(storage, Prefixed(child, _PREFIXES["pretrain"])))
        self._open[trial.key] = child, following
        log.info("trial %s: %s", self._place(trial), trial.describe())

    def close(self, trial: Trial) -> None:
        """Wait until the trial's run has every point, picture and final number, and end it as the ledger says."""
        self.open(trial)
        child, following = self._open.pop(trial.key)
        following.close()
        entry = trial.entry() or {"error": "unknown"}
        if entry["error"]:
            child.set_tags({"mae.error": entry["error"][:500]})
            child.finish("FAILED")
            log.warning("trial %s failed: %s", self._place(trial), entry["error"])
            return
        if is_stopped(entry):
            where = entry["stopped"]
            child.set_tags({"mae.stopped": f"asha, epoch {where['epoch']}"})
            child.finish("FINISHED")
            trial.storage.write(CLOSED, json.dumps({"run_id": child.id}).encode())
            log.info(
                "trial %s: stopped at epoch %d with %.2f by the online probe (%.0f s)",
                self._place(trial), where["epoch"], where["online"], entry["duration_s"],
            )  # fmt: skip
            return
        now_ms = int(time.time() * 1000)
        child.log_points([Point(f"{m}_top1", entry[m], 0, now_ms) for m in MEASURES])
        child.finish("FINISHED")
        trial.storage.write(CLOSED, json.dumps({"run_id": child.id}).encode())
        log.info(
            "trial %s: probe %.2f, fine-tuned %.2f (%.0f s)",
            self._place(trial),
            *(entry[measure] for measure in MEASURES),
            entry["duration_s"],
        )

    def catch_up(self, trials: Sequence[Trial]) -> None:
        """Report finished trials that MLflow does not know, because the driver was killed before reporting them."""
        with self:
            for trial in trials:
                if trial.is_finished() and not trial.storage.exists(CLOSED):
                    self.close(trial)

    def find(self, trial: Trial) -> registry.Run:
        """Return the run of a finished trial; report the trial again if MLflow does not know it."""
        key = trial.claim()
        found = self._tracking.find_run(key)
        if found is None:
            self.close(trial)
            found = self._tracking.find_run(key)
        assert found is not None, "a run that was just made is found"
        return found

    def _place(self, trial: Trial) -> str:
        return f"{self._number[trial.key]} of {len(self._number)}"
