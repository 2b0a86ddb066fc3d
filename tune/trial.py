"""A trial: a pretraining, its probe and its fine-tuning, in a folder named by a hash of the full config.

A baseline is a trial without pretraining. Trials of points that pretrain alike share the folder of that pretraining.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mae_core.config import ModelConfig, patch_grid
from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines.cluster import machine
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, identity
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.classify import StartingEncoder, published_classify_job, with_labelled_dataset
from pipelines.drivers.drive import claim
from pipelines.drivers.launch import launch
from pipelines.drivers.pretrain import pixels_of, published_pretrain_job, with_dataset
from pipelines.runs.automatic import describe_compute, is_automatic, settle
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, IndexedDataset, IndexedJob, Job, PretrainJob
from pipelines.runs.stopping import StopRequest
from pipelines.storage import Storage, open_storage
from tune.proposals import proposed
from tune.space import Point, check_fields, describe, parts_at, points, varies_classifiers

log = logging.getLogger(__name__)

Measure = Literal["probe", "finetune"]
MEASURES: tuple[Measure, ...] = ("probe", "finetune")
LABEL_FIELDS = ("finetune.labels", "finetune.data.labels_per_class")
"""Fields of a point that its baseline shares, since both train on the same labels."""
Config = TypeVar("Config", PretrainConfig, ClassifyConfig)
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
        """Return whether the trial has its results. A failed trial has none."""
        entry = self.entry()
        return entry is not None and not entry["error"]

    def record(self, error: str = "", wall_s: float = 0.0) -> dict[str, Any]:
        """Record in the ledger how the trial ended; return the entry.

        `duration_s` is that of the jobs and counts from their last start; `wall_s` adds the start of the worker group.
        """
        results = {} if error else {name: RunFolder(job.folder).read_result() or {} for name, job in self.jobs.items()}
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
            "loss": results.get("pretrain", {}).get("loss"),
            "duration_s": round(sum(result.get("duration_s", 0.0) for result in results.values()), 1),
            "wall_s": round(wall_s, 1),
            "error": error,
        }
        self.storage.write(_ENTRY, json.dumps(entry, indent=1).encode())
        return entry


def plan(config: SweepConfig, folder: Storage) -> list[Trial]:
    """Return every trial: all points and baselines with the first seed, then with the next.

    With `search` tpe, these are the trials of all rounds up to the first that has not ended. Raises UserError before
    anything is written.
    """
    if config.search == "tpe":
        check_fields(config)
        found = proposed(config, lambda point: _reached(config, point, folder))
    else:
        found = points(config)
    trials: list[Trial] = []
    for seed in range(config.seeds):
        trials += [_trial(config, point, seed, folder) for point in found]
        if config.baselines:
            scratch = [_baseline(config, point, seed, folder) for point in found]
            trials += {trial.key: trial for trial in scratch}.values()
    return trials


def _reached(config: SweepConfig, point: Point, folder: Storage) -> float | None:
    """Return the mean accuracy of the point's trials on val; None if one has not ended, NaN if none has a result."""
    entries = [_trial(config, point, seed, folder).entry() for seed in range(config.seeds)]
    if None in entries:
        return None
    values = [entry[config.select_by] for entry in entries if entry and not entry["error"]]
    return statistics.fmean(values) if values else math.nan


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

    Trials that share a pretraining are in one group, whatever its size.
    """
    alike = itertools.groupby(
        sorted(trials, key=lambda trial: repr(trial.main.compute)), key=lambda trial: trial.main.compute
    )
    groups: list[list[Trial]] = []
    for _, kind in alike:
        shared: dict[str, list[Trial]] = {}
        for trial in kind:
            shared.setdefault(trial.pretrain.folder if trial.pretrain else trial.folder, []).append(trial)
        last: list[Trial] = []
        for together in shared.values():
            if not last or len(last) + len(together) > per_group:
                groups.append(last := [])
            last += together
    return groups


def run(trials: Sequence[Trial], stop: StopRequest) -> None:
    """Run the trials in turn on one worker group, and record each in the ledger with its results or its error.

    Trials that are unfinished when `stop` is made are not recorded, so that the next sweep resumes them.

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
            continue
        elif len(trials) > 1:
            run([trial], stop)
        else:
            trial.record(error, wall_s)


def _failure(jobs: list[IndexedJob], name: str, stop: StopRequest) -> str:
    """Run the jobs; return their error in one line, empty if there was none."""
    try:
        launch(jobs, name, stop=stop)
    except Exception as error:
        return " ".join(str(error).split()) or repr(error)
    return ""


def settled(config: SweepConfig) -> tuple[SweepConfig, Manifest]:
    """Return the sweep with its dataset's absolute URI, and the dataset's manifest.

    Raises UserError if the dataset is unsuitable for pretraining, has no labels, or has no split val to select the best
    trial.
    """
    base, manifest = with_dataset(config.pretrain)
    if manifest.is_labelled and "val" not in manifest.splits:
        raise UserError(
            f"dataset {config.pretrain.data.uri} has no split 'val' to select the best trial on; prepare its "
            "source into another folder with --hold-out stratified, or with a folder val/"
        )
    config = dataclasses.replace(config, pretrain=base)
    for classify in (config.probe, config.finetune):
        with_labelled_dataset(of_trial(classify, base))
    return config, manifest


def of_trial(config: ClassifyConfig, pretrain: PretrainConfig) -> ClassifyConfig:
    """Return the classifier's config with the trial's own dataset, model and compute settings, measured on val."""
    return dataclasses.replace(
        config,
        name="",
        output=pretrain.output,
        # The weights come from the trial's export, which the job names, not from a registered version.
        backbone=f"random:{pretrain.model.arch}",
        data=dataclasses.replace(config.data, uri=pretrain.data.uri),
        compute=pretrain.compute,
        eval_split="val",
    )


def _trial(config: SweepConfig, point: Point, seed: int, folder: Storage) -> Trial:
    at_point, *classifiers = parts_at(config, point)
    pretrain, manifest = with_dataset(_with_seed(at_point, seed))
    classify = {m: of_trial(_with_seed(part, seed), pretrain) for m, part in zip(MEASURES, classifiers)}
    identities = [identity(pretrain), *map(identity, classify.values()), manifest.digest]
    key = _hash(identities)
    home = folder.join(f"trials/{key}")
    # Points that differ in probe or fine-tuning share a pretraining, so its folder is none of a trial's.
    is_shared = varies_classifiers(config)
    output = folder.join(f"shared/{_hash([identity(pretrain), manifest.digest])}") if is_shared else home
    published = published_pretrain_job(dataclasses.replace(pretrain, output=output), "pretrain", manifest)
    job, datasets = published.job, {"pretrain": published.dataset}
    assert isinstance(job, PretrainJob)
    jobs: dict[Measure, ClassifyJob] = {}
    try:
        for measure in MEASURES:
            name = f"{measure}-{_hash([identity(classify[measure])])}" if is_shared else measure
            on_val = dataclasses.replace(classify[measure], output=output)
            jobs[measure], datasets[measure] = classify_job(on_val, name, job, manifest)
    except ValueError as error:
        raise UserError(f"space point {describe(point)}: {error}") from None
    return Trial(key=key, point=point, seed=seed, folder=home, pretrain=job, **jobs, datasets=datasets)


def _baseline(config: SweepConfig, point: Point, seed: int, folder: Storage) -> Trial:
    """Return the baseline of the point: the same for all points with its encoder, its input and its labels."""
    pretrain, probe, finetune = parts_at(config, point)
    pretrain, manifest = with_dataset(pretrain)
    recipe, model = _with_seed(config.scratch, seed), pretrain.model
    labels = dataclasses.replace(recipe.data, labels_per_class=finetune.data.labels_per_class)
    recipe = dataclasses.replace(recipe, labels=finetune.labels, data=labels)
    classify = {"probe": of_trial(_with_seed(probe, seed), pretrain), "finetune": of_trial(recipe, pretrain)}
    inputs = [model.arch, model.image_px, model.channels, model.norm_eps]
    key = _hash(["from scratch", inputs, *map(identity, classify.values()), manifest.digest])
    home = folder.join(f"trials/{key}")
    jobs: dict[Measure, ClassifyJob] = {}
    datasets: dict[str, IndexedDataset] = {}
    for measure in MEASURES:
        on_val = dataclasses.replace(classify[measure], output=home)
        start = _encoder_of(on_val, model, pixels_of(manifest, model.channels))
        published = published_classify_job(on_val, measure, start, manifest)
        assert isinstance(published.job, ClassifyJob)
        jobs[measure], datasets[measure] = published.job, published.dataset
    same = {field: value for field, value in point.items() if field in LABEL_FIELDS}
    return Trial(key=key, point=same, seed=seed, folder=home, pretrain=None, **jobs, datasets=datasets)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, seed=config.seed + seed)


def classify_job(
    config: ClassifyConfig, name: str, pretrained: PretrainJob, manifest: Manifest
) -> tuple[ClassifyJob, IndexedDataset]:
    """Return a probe or fine-tuning job on the pretraining's export, in the folder <output>/<name>, and its dataset."""
    start = _encoder_of(config, pretrained.config.model, pretrained.pixels)
    published = published_classify_job(config, name, start, manifest)
    assert isinstance(published.job, ClassifyJob)
    job = dataclasses.replace(published.job, backbone=f"{pretrained.folder}/export", chosen=pretrained.chosen)
    return job, published.dataset


def _encoder_of(config: ClassifyConfig, model: ModelConfig, pixels: Normalization) -> StartingEncoder:
    """Describe the encoder that a classifier of the trial starts from, without weights."""
    image_px = config.image_px or model.image_px
    patch_grid(image_px, model.patch_px)
    return StartingEncoder(
        arch=model.arch,
        image_px=image_px,
        channels=model.channels,
        pixels=pixels,
        ref=None,
        encoder=b"",
        backbone_px=model.image_px,
        norm_eps=model.norm_eps,
    )
