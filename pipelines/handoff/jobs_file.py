"""Read handoff.yaml, and resolve each job to the training that the version with its alias should have had."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import (
    PROBE,
    ClassifyConfig,
    HandoffJob,
    HandoffPlan,
    config_hash,
    from_dict,
    load_preset,
    options_for,
    with_overrides,
)
from pipelines.drivers.classify import with_labelled_dataset

JOB_TAG, CONFIG_TAG = "handoff.job", "handoff.config"
"""Tags of the run and of the classifier: the job's name, and the digest of config, version and dataset."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One job for one version and one dataset. Its name is the run's, and a function of all that decides the result."""

    job: str
    name: str
    version: str
    """URI of the version that it starts from."""
    digest: str
    words: tuple[str, ...]
    """Words of the `mae` command, without `mae`."""
    experiment: str


def read_plan(path: str) -> HandoffPlan:
    """Read the file. Raises UserError that names each wrong key or value."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no {path}; write one as docs/handoff.md shows")
    try:
        values: Any = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}; fix the file") from None
    if not isinstance(values, dict) or not isinstance(values.get("jobs"), list):
        raise UserError(f"{path} has no list `jobs`; write one as docs/handoff.md shows")
    missing = [key for key in ("output",) if key not in values]
    if missing:
        raise UserError(f"{path} has no {missing[0]}; add `output: s3://bucket/runs`")
    try:
        # One by one, since unknown keys of objects in a list would be ignored.
        jobs = [_job(entry, file.parent) for entry in values["jobs"]]
        return from_dict(HandoffPlan, {**values, "jobs": jobs})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _job(values: Any, folder: Path) -> HandoffJob:
    if not isinstance(values, dict) or not {"name", "model"} <= values.keys():
        raise UserError(
            f"job {values!r} has no name and model; try `- name: flowers` and `model: mae-vit_base_patch16`"
        )
    job = from_dict(HandoffJob, values)
    if job.preset.endswith((".yaml", ".yml")):
        job = dataclasses.replace(job, preset=str(folder / job.preset))
    config_of(job)
    return job


def config_of(job: HandoffJob) -> ClassifyConfig:
    """Return the job's config, without version, output and name. Raises UserError that names the job."""
    try:
        config = load_preset(ClassifyConfig, job.preset) if job.preset else _default(job.command)
        config = with_overrides(config, job.options)
    except UserError as error:
        raise UserError(f"job {job.name}: {error}") from None
    if config.classifier.command != job.command:
        raise UserError(
            f"job {job.name} has command {job.command}, but classifier.method {config.classifier.method}; "
            f"try command: {config.classifier.command}"
        )
    return config


def training_of(job: HandoffJob, output: str, ref: registry.ModelRef) -> Training:
    """Return the training of the job for this version. Raises UserError if its dataset is none that it can use."""
    config, manifest = with_labelled_dataset(dataclasses.replace(config_of(job), backbone=ref.uri, output=output))
    digest = config_hash(config, manifest.digest)
    name = f"{job.name}-v{ref.version}-{digest}"
    tags = (f"{JOB_TAG}={job.name}", f"{CONFIG_TAG}={digest}")
    config = dataclasses.replace(
        config, name=name, tracking=dataclasses.replace(config.tracking, tags=(*config.tracking.tags, *tags))
    )
    return Training(
        job=job.name,
        name=name,
        version=ref.uri,
        digest=digest,
        words=(job.command, *words_of(config, job.command)),
        experiment=config.tracking.experiment,
    )


def words_of(config: ClassifyConfig, command: str) -> list[str]:
    """Return the options with which `mae finetune` or `mae probe` gets exactly this config, without any preset."""
    # Stated always, since a command line scales a warm-up that is not stated with its epochs.
    warmup = f"--optim.warmup-epochs={config.optim.warmup_epochs}"
    return [*(word for word in options_for(config, _default(command)) if word != warmup), warmup]


def _default(command: str) -> ClassifyConfig:
    return PROBE if command == "probe" else ClassifyConfig()
