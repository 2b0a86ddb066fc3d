"""A trial: a pretraining, its probe and its fine-tuning, in a folder named by a hash of the full config."""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mae_core.config import patch_grid
from mae_core.errors import UserError
from pipelines.cluster import machine
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, identity
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.classify import StartingEncoder, published_classify_job, with_labelled_dataset
from pipelines.drivers.launch import launch
from pipelines.drivers.pretrain import published_pretrain_job, with_dataset
from pipelines.runs.automatic import describe_compute, is_automatic, settle
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, IndexedDataset, IndexedJob, Job, PretrainJob
from pipelines.runs.stopping import StopRequest
from pipelines.storage import Storage, open_storage
from tune.space import Point, at, describe, points

log = logging.getLogger(__name__)

Measure = Literal["probe", "finetune"]
MEASURES: tuple[Measure, ...] = ("probe", "finetune")
_ENTRY = "trial.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a sweep, ready to run on a worker group."""

    key: str
    """Hash (twelve hex digits) of everything that determines the result: the configs and the dataset."""
    point: Point
    folder: str
    """URI of the trial's folder."""
    pretrain: PretrainJob
    probe: ClassifyJob
    finetune: ClassifyJob
    datasets: dict[str, IndexedDataset]
    """Dataset as each job reads it, by the job's name; indexed when the sweep is planned."""

    @property
    def manifest(self) -> Manifest:
        return self.datasets["pretrain"].manifest

    @property
    def jobs(self) -> dict[str, Job]:
        """Jobs in the order in which they run, by the name of their folder."""
        return {"pretrain": self.pretrain, "probe": self.probe, "finetune": self.finetune}

    @property
    def storage(self) -> Storage:
        return open_storage(self.folder)

    def entry(self) -> dict[str, Any] | None:
        """Return the trial's entry in the ledger; None while it has not ended."""
        return json.loads(self.storage.read(_ENTRY)) if self.storage.exists(_ENTRY) else None

    def is_finished(self) -> bool:
        """Return whether the trial has its results. A failed trial has none."""
        entry = self.entry()
        return entry is not None and not entry["error"]

    def record(self, error: str = "") -> dict[str, Any]:
        """Record in the ledger how the trial ended; return the entry. Durations count from the last start."""
        results = {} if error else {name: RunFolder(job.folder).read_result() or {} for name, job in self.jobs.items()}
        model = self.pretrain.config.model
        entry = {
            "key": self.key,
            "point": self.point,
            "visible": model.num_visible,
            "patches": model.num_patches,
            "probe": results.get("probe", {}).get("top1"),
            "finetune": results.get("finetune", {}).get("top1"),
            "loss": results.get("pretrain", {}).get("loss"),
            "duration_s": round(sum(result.get("duration_s", 0.0) for result in results.values()), 1),
            "error": error,
        }
        self.storage.write(_ENTRY, json.dumps(entry, indent=1).encode())
        return entry


def plan(config: SweepConfig, folder: Storage) -> list[Trial]:
    """Return every trial of the sweep, in the order of its points. Raises UserError before anything is written."""
    return [_trial(config, point, folder) for point in points(config)]


def with_choices(trials: Sequence[Trial], max_concurrent: int) -> list[Trial]:
    """Return the trials with a value for every auto in their compute options, for groups that share the machine."""
    if not any(is_automatic(trial.pretrain.config.compute) for trial in trials):
        return list(trials)
    here = machine().share(max_concurrent)
    found = []
    for trial in trials:
        pretrain = settle(trial.pretrain, here)
        assert isinstance(pretrain, PretrainJob)
        probe = dataclasses.replace(trial.probe, chosen=pretrain.chosen)
        finetune = dataclasses.replace(trial.finetune, chosen=pretrain.chosen)
        found.append(dataclasses.replace(trial, pretrain=pretrain, probe=probe, finetune=finetune))
    log.info("each trial: %s", describe_compute(found[0].pretrain.config, found[0].pretrain.compute, here))
    return found


def grouped(trials: Sequence[Trial], per_group: int) -> list[list[Trial]]:
    """Split the trials into groups of at most `per_group`, each with one compute config."""
    alike = itertools.groupby(
        sorted(trials, key=lambda trial: repr(trial.pretrain.compute)),
        key=lambda trial: trial.pretrain.compute,
    )
    kinds = [list(kind) for _, kind in alike]
    return [kind[i : i + per_group] for kind in kinds for i in range(0, len(kind), per_group)]


def run(trials: Sequence[Trial], stop: StopRequest) -> None:
    """Run the trials in turn on one worker group, and record each in the ledger with its results or its error.

    Trials that are unfinished when `stop` is made are not recorded, so that the next sweep resumes them.

    Unfinished jobs resume from their newest checkpoint. If a group fails, each of its unfinished trials is run again
    alone, so that one trial's failure does not affect the others.
    """
    unfinished = [
        (job, trial.datasets[name])
        for trial in trials
        for name, job in trial.jobs.items()
        if RunFolder(job.folder).read_result() is None
    ]
    error = _failure(unfinished, f"trial-{trials[0].key}", stop) if unfinished else ""
    for trial in trials:
        if all(RunFolder(job.folder).read_result() for job in trial.jobs.values()):
            trial.record()
        elif stop.is_made():
            continue
        elif len(trials) > 1:
            run([trial], stop)
        else:
            trial.record(error)


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


def _trial(config: SweepConfig, point: Point, folder: Storage) -> Trial:
    pretrain, manifest = with_dataset(at(config.pretrain, point))
    classify = {measure: of_trial(getattr(config, measure), pretrain) for measure in MEASURES}
    identities = [identity(pretrain), *map(identity, classify.values()), manifest.digest]
    key = hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:12]
    home = folder.join(f"trials/{key}")
    published = published_pretrain_job(dataclasses.replace(pretrain, output=home), "pretrain", manifest)
    job, datasets = published.job, {"pretrain": published.dataset}
    assert isinstance(job, PretrainJob)
    jobs: dict[Measure, ClassifyJob] = {}
    try:
        for measure in MEASURES:
            on_val = dataclasses.replace(classify[measure], output=home)
            jobs[measure], datasets[measure] = classify_job(on_val, measure, job, manifest)
    except ValueError as error:
        raise UserError(f"space point {describe(point)}: {error}") from None
    return Trial(key=key, point=point, folder=home, pretrain=job, **jobs, datasets=datasets)


def classify_job(
    config: ClassifyConfig, name: str, pretrained: PretrainJob, manifest: Manifest
) -> tuple[ClassifyJob, IndexedDataset]:
    """Return a probe or fine-tuning job on the pretraining's export, in the folder <output>/<name>, and its dataset."""
    model = pretrained.config.model
    image_px = config.image_px or model.image_px
    patch_grid(image_px, model.patch_px)
    start = StartingEncoder(
        arch=model.arch,
        image_px=image_px,
        channels=model.channels,
        pixels=pretrained.pixels,
        ref=None,
        encoder=b"",
        backbone_px=model.image_px,
        norm_eps=model.norm_eps,
    )
    published = published_classify_job(config, name, start, manifest)
    assert isinstance(published.job, ClassifyJob)
    job = dataclasses.replace(published.job, backbone=f"{pretrained.folder}/export", chosen=pretrained.chosen)
    return job, published.dataset
