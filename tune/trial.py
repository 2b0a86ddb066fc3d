"""A trial: a pretraining, its probe and its fine-tuning, in a folder that its whole config names."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mae_core.config import patch_grid
from mae_core.errors import UserError
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, identity
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.classify import StartingEncoder, published_classify_job, with_labelled_dataset
from pipelines.drivers.launch import launch
from pipelines.drivers.pretrain import published_pretrain_job, with_dataset
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, Job, PretrainJob
from pipelines.storage import Storage, open_storage
from tune.space import Point, at, points, said

Measure = Literal["probe", "finetune"]
MEASURES: tuple[Measure, ...] = ("probe", "finetune")
_ENTRY = "trial.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a sweep, ready for a worker group."""

    key: str
    """Twelve hex digits over all that decides the result: another config or dataset is another trial."""
    point: Point
    folder: str
    """URI of the trial's folder."""
    pretrain: PretrainJob
    probe: ClassifyJob
    finetune: ClassifyJob

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs in the order in which they run, by the name of their folder."""
        return {"pretrain": self.pretrain, "probe": self.probe, "finetune": self.finetune}

    @property
    def storage(self) -> Storage:
        return open_storage(self.folder)

    def entry(self) -> dict[str, Any] | None:
        """What the ledger says about the trial; None while it has not ended."""
        return json.loads(self.storage.read(_ENTRY)) if self.storage.exists(_ENTRY) else None

    def is_finished(self) -> bool:
        """Whether the trial has its results; one that failed has not."""
        entry = self.entry()
        return entry is not None and not entry["error"]

    def enter(self, error: str = "") -> dict[str, Any]:
        """The ledger says how the trial ended; returns the entry. What was killed counts from its last start."""
        found = {} if error else {name: RunFolder(job.folder).read_result() or {} for name, job in self.jobs.items()}
        model = self.pretrain.config.model
        entry = {
            "key": self.key,
            "point": self.point,
            "visible": model.num_visible,
            "patches": model.num_patches,
            "probe": found.get("probe", {}).get("top1"),
            "finetune": found.get("finetune", {}).get("top1"),
            "loss": found.get("pretrain", {}).get("loss"),
            "duration_s": round(sum(result.get("duration_s", 0.0) for result in found.values()), 1),
            "error": error,
        }
        self.storage.write(_ENTRY, json.dumps(entry, indent=1).encode())
        return entry


def plan(config: SweepConfig, folder: Storage) -> list[Trial]:
    """Every trial of the sweep, in the order of its points. Raises UserError before anything is written."""
    return [_trial(config, point, folder) for point in points(config)]


def grouped(trials: Sequence[Trial], per_group: int) -> list[list[Trial]]:
    """The trials in groups of at most so many, each group of one kind of worker group."""
    alike = itertools.groupby(
        sorted(trials, key=lambda trial: repr(trial.pretrain.config.compute)),
        key=lambda trial: trial.pretrain.config.compute,
    )
    kinds = [list(kind) for _, kind in alike]
    return [kind[i : i + per_group] for kind in kinds for i in range(0, len(kind), per_group)]


def run(trials: Sequence[Trial]) -> None:
    """The trials, run in turn by one worker group, are in the ledger with their results or with what stopped them.

    What an earlier start left undone goes on from its newest checkpoint. One trial's failure is not the others': a
    group that fails is started again for each of its unfinished trials alone.
    """
    unfinished = [job for trial in trials for job in trial.jobs.values() if RunFolder(job.folder).read_result() is None]
    error = _failure(unfinished, f"trial-{trials[0].key}") if unfinished else ""
    for trial in trials:
        if all(RunFolder(job.folder).read_result() for job in trial.jobs.values()):
            trial.enter()
        elif len(trials) > 1:
            run([trial])
        else:
            trial.enter(error)


def _failure(jobs: list[Job], name: str) -> str:
    """What stopped the jobs, in one line; empty where nothing did."""
    try:
        launch(jobs, name)
    except Exception as error:
        return " ".join(str(error).split()) or repr(error)
    return ""


def settled(config: SweepConfig) -> tuple[SweepConfig, Manifest]:
    """The sweep with its dataset's absolute URI, and that dataset.

    Raises UserError where the dataset cannot be pretrained on, has no labels, or has no val to choose the best on.
    """
    base, manifest = with_dataset(config.pretrain)
    if manifest.is_labelled and "val" not in manifest.splits:
        raise UserError(
            f"dataset {config.pretrain.data.uri} has no split 'val' to choose the best trial on; prepare it again "
            "with --val-fraction 0.1, or with a val/ folder"
        )
    config = dataclasses.replace(config, pretrain=base)
    for classify in (config.probe, config.finetune):
        with_labelled_dataset(of_trial(classify, base))
    return config, manifest


def of_trial(config: ClassifyConfig, pretrain: PretrainConfig) -> ClassifyConfig:
    """The classifier's config with all that is the trial's own, measured on val."""
    return dataclasses.replace(
        config,
        name="",
        output=pretrain.output,
        # Its weights are the trial's export, which the job names; no version of a registered model.
        backbone=f"random:{pretrain.model.arch}",
        data=dataclasses.replace(config.data, uri=pretrain.data.uri),
        compute=pretrain.compute,
        eval_split="val",
    )


def _trial(config: SweepConfig, point: Point, folder: Storage) -> Trial:
    pretrain, manifest = with_dataset(at(config.pretrain, point))
    classify = {measure: of_trial(getattr(config, measure), pretrain) for measure in MEASURES}
    said_by = [identity(pretrain), *map(identity, classify.values()), manifest.digest]
    key = hashlib.sha256(json.dumps(said_by, sort_keys=True).encode()).hexdigest()[:12]
    home = folder.join(f"trials/{key}")
    job = published_pretrain_job(dataclasses.replace(pretrain, output=home), "pretrain", manifest).job
    assert isinstance(job, PretrainJob)
    try:
        jobs = {
            measure: classify_job(dataclasses.replace(values, output=home), measure, job, manifest)
            for measure, values in classify.items()
        }
    except ValueError as error:
        raise UserError(f"space point {said(point)}: {error}") from None
    return Trial(key=key, point=point, folder=home, pretrain=job, probe=jobs["probe"], finetune=jobs["finetune"])


def classify_job(config: ClassifyConfig, name: str, pretrained: PretrainJob, manifest: Manifest) -> ClassifyJob:
    """A probe or fine-tuning of what the pretraining exports, in the folder <output>/<name>."""
    model = pretrained.config.model
    image_px = config.image_px or model.image_px
    patch_grid(image_px, model.patch_px)
    start = StartingEncoder(
        arch=model.arch, image_px=image_px, channels=model.channels, pixels=pretrained.pixels, ref=None, encoder=b""
    )
    job = published_classify_job(config, name, start, manifest).job
    assert isinstance(job, ClassifyJob)
    return dataclasses.replace(job, backbone=f"{pretrained.folder}/export")
