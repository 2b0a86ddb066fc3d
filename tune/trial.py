"""A trial: a pretraining, its probe and its fine-tuning, in a folder named by a hash of the full config.

A baseline is a trial without pretraining. Trials of points that pretrain alike share the folder of that pretraining.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.cluster import machine
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.drive import claim
from pipelines.drivers.launch import launch
from pipelines.runs.automatic import describe_compute, is_automatic, settle
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, Job, PretrainJob
from pipelines.runs.plans import IndexedDataset, IndexedJob
from pipelines.runs.stopping import StopRequest
from pipelines.storage import Storage, open_storage
from tune.space import Point, describe

log = logging.getLogger(__name__)

Measure = Literal["probe", "finetune"]
MEASURES: tuple[Measure, ...] = ("probe", "finetune")
LABEL_FIELDS = ("finetune.labels", "finetune.data.labels_per_class")
"""Fields of a point that its baseline shares, since both train on the same labels."""
CLOSED = "closed.json"
"""File of a trial whose MLflow run has all its results; it holds the run's id."""
_ENTRY = "trial.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a sweep with one seed, or a baseline without pretraining, ready to run on a worker group."""

    key: str
    """Hash (twelve hex digits) of everything that determines the result: the configs and the dataset."""
    point: Point
    seed: int
    """Number of the seed, from 0: what is added to the seeds of the configs."""
    folder: str
    """URI of the trial's folder."""
    pretrain: PretrainJob | None
    """None for a baseline, whose fine-tuning trains from scratch and whose probe reads a random encoder."""
    probe: ClassifyJob
    finetune: ClassifyJob
    datasets: dict[str, IndexedDataset]
    """Dataset as each job reads it, by the job's name; indexed when the sweep is planned."""

    @property
    def manifest(self) -> Manifest:
        return self.datasets["finetune"].manifest

    @property
    def jobs(self) -> dict[str, Job]:
        """Jobs in the order in which they run, by the name of their folder."""
        pretrain = {} if self.pretrain is None else {"pretrain": self.pretrain}
        return {**pretrain, "probe": self.probe, "finetune": self.finetune}

    @property
    def main(self) -> Job:
        """The trial's main training."""
        return self.pretrain or self.finetune

    @property
    def storage(self) -> Storage:
        return open_storage(self.folder)

    def claim(self) -> str:
        """Claim the folder of the trial's main training; return the id by which its MLflow run is found."""
        if self.pretrain is None:
            return claim(self.finetune, "finetune", self.manifest)
        key = claim(self.pretrain, "pretrain", self.manifest)
        # Trials that share a pretraining have a run each.
        return key if self.pretrain.folder.startswith(self.folder) else f"{key}-{self.key}"

    def describe(self) -> str:
        """Format what distinguishes the trial as a user writes it."""
        words = [] if self.pretrain else ["from scratch"]
        words += [describe(self.point)] if self.point else []
        return ", ".join(words + ([f"seed {self.seed}"] if self.seed else []))

    def entry(self) -> dict[str, Any] | None:
        """Return the trial's entry in the ledger; None while it has not ended."""
        return json.loads(self.storage.read(_ENTRY)) if self.storage.exists(_ENTRY) else None

    def is_finished(self) -> bool:
        """Return whether the trial has ended for good: with results, or stopped early. A failed trial is retried."""
        entry = self.entry()
        return entry is not None and not entry["error"]

    def is_stopped_early(self) -> bool:
        """Return whether early stopping ended the trial."""
        entry = self.entry()
        return entry is not None and is_stopped(entry)

    def _num_val(self, name: Measure) -> int:
        """Return the number of images on which a classifier of the trial is measured."""
        job = self.probe if name == "probe" else self.finetune
        manifest, split = self.datasets[name].manifest, job.config.eval_split
        return manifest.split(split).num_rows - manifest.num_unlabelled.get(split, 0)

    def record(self, error: str = "", wall_s: float = 0.0, stopped: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Record in the ledger how the trial ended; return the entry.

        `stopped` says where early stopping ended it, if it did. `duration_s` is that of the jobs and counts from their
        last start; `wall_s` adds the start of the worker group.
        """
        has_none = bool(error) or stopped is not None
        results = (
            {} if has_none else {name: RunFolder(job.folder).read_result() or {} for name, job in self.jobs.items()}
        )
        model = self.pretrain.config.model if self.pretrain else None
        entry = {
            "key": self.key,
            "kind": "mae" if self.pretrain else "scratch",
            "point": self.point,
            "seed": self.seed,
            "visible": model.num_visible if model else None,
            "patches": model.num_patches if model else None,
            "probe": results.get("probe", {}).get("top1"),
            "finetune": results.get("finetune", {}).get("top1"),
            "num_val": {name: self._num_val(name) for name in MEASURES},
            "loss": results.get("pretrain", {}).get("loss"),
            "duration_s": round(sum(result.get("duration_s", 0.0) for result in results.values()), 1),
            "wall_s": round(wall_s, 1),
            "error": error,
        }
        if stopped is not None:
            entry |= {"stopped": dict(stopped), "duration_s": entry["wall_s"]}
        self.storage.write(_ENTRY, json.dumps(entry, indent=1).encode())
        return entry


def is_stopped(entry: Mapping[str, Any]) -> bool:
    """Return whether early stopping ended the entry's trial, which then has no result."""
    return bool(entry.get("stopped"))


def with_choices(trials: Sequence[Trial], max_concurrent: int) -> list[Trial]:
    """Return the trials with a value for every auto in their compute options, for groups that share the machine."""
    if not any(is_automatic(trial.main.config.compute) for trial in trials):
        return list(trials)
    here = machine().share(max_concurrent)
    found = []
    for trial in trials:
        chosen = settle(trial.main, here).chosen
        jobs: dict[str, Any] = {name: dataclasses.replace(job, chosen=chosen) for name, job in trial.jobs.items()}
        found.append(dataclasses.replace(trial, **jobs))
    log.info("each trial: %s", describe_compute(found[0].main.config, found[0].main.compute, here))
    return found


def grouped(trials: Sequence[Trial], per_group: int) -> list[list[Trial]]:
    """Split the trials into groups of at most `per_group`, each with one compute config.

    They are filled from the end, so that what is left over makes the first one smaller and not the last, which has the
    baselines, which are short. Trials that share a pretraining are in one group, whatever its size.
    """
    alike = itertools.groupby(
        sorted(trials, key=lambda trial: repr(trial.main.compute)), key=lambda trial: trial.main.compute
    )
    groups: list[list[Trial]] = []
    for _, kind in alike:
        shared: dict[str, list[Trial]] = {}
        for trial in kind:
            shared.setdefault(trial.pretrain.folder if trial.pretrain else trial.folder, []).append(trial)
        backwards: list[list[Trial]] = []
        for together in reversed(shared.values()):
            if not backwards or len(backwards[-1]) + len(together) > per_group:
                backwards.append([])
            backwards[-1][:0] = together
        groups += reversed(backwards)
    return groups


def run(
    trials: Sequence[Trial], stop: StopRequest, stopped: Callable[[], Mapping[str, Any] | None] = lambda: None
) -> None:
    """Run the trials in turn on one worker group, and record each in the ledger with its results or its error.

    Trials that are unfinished when `stop` is made are not recorded, so that the next sweep resumes them, unless
    `stopped` says where early stopping ended them.

    Unfinished jobs resume from their newest checkpoint. If a group fails, each of its unfinished trials is run again
    alone, so that one trial's failure does not affect the others.
    """
    started_s = time.monotonic()
    # By folder, because trials may share a pretraining.
    unfinished = {
        job.folder: (job, trial.datasets[name])
        for trial in trials
        for name, job in trial.jobs.items()
        if RunFolder(job.folder).read_result() is None
    }
    error = _failure(list(unfinished.values()), f"trial-{trials[0].key}", stop) if unfinished else ""
    wall_s = (time.monotonic() - started_s) / len(trials)
    for trial in trials:
        if all(RunFolder(job.folder).read_result() for job in trial.jobs.values()):
            trial.record(wall_s=wall_s)
        elif stop.is_made():
            if (where := stopped()) is not None:
                trial.record(wall_s=wall_s, stopped=where)
        elif len(trials) > 1:
            run([trial], stop, stopped)
        else:
            trial.record(error, wall_s)


def _failure(jobs: list[IndexedJob], name: str, stop: StopRequest) -> str:
    """Run the jobs; return their error in one line, empty if there was none."""
    try:
        launch(jobs, name, stop=stop)
    except Exception as error:
        return " ".join(str(error).split()) or repr(error)
    return ""
