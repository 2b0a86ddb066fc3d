"""Plan a sweep: its trials and baselines, each with its configs, folders and jobs, before any of them runs."""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

from mae_core.config import ModelConfig, patch_grid
from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, identity
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.classify import StartingEncoder, published_classify_job, with_labelled_dataset
from pipelines.drivers.pretrain import pixels_of, published_pretrain_job, with_dataset
from pipelines.runs.jobs import ClassifyJob, PretrainJob
from pipelines.runs.plans import IndexedDataset
from pipelines.storage import Storage
from tune.proposals import proposed
from tune.results import has_result
from tune.space import Point, check_fields, describe, parts_at, points, varies_classifiers
from tune.trial import LABEL_FIELDS, MEASURES, Measure, Trial

Config = TypeVar("Config", PretrainConfig, ClassifyConfig)


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


def without_stopped(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without those of further seeds of a point that early stopping ended with the first one."""
    stopped = [trial.point for trial in trials if trial.seed == 0 and trial.is_stopped_early()]
    return [trial for trial in trials if trial.seed == 0 or trial.pretrain is None or trial.point not in stopped]


def _reached(config: SweepConfig, point: Point, folder: Storage) -> float | None:
    """Return the mean accuracy of the point's trials on val; None if one has not ended, NaN if none has a result."""
    entries = [_trial(config, point, seed, folder).entry() for seed in range(config.seeds)]
    if None in entries:
        return None
    values = [entry[config.select_by] for entry in entries if entry and has_result(entry)]
    return statistics.fmean(values) if values else math.nan


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


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, seed=config.seed + seed)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
