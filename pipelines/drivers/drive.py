"""Execute jobs for a command: claim run folders, run the worker group, deliver metrics to MLflow, publish results."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from pipelines import registry
from pipelines.cluster import machine, ray_address, ray_session
from pipelines.config import PretrainConfig, identity, to_dict, without_added_defaults
from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.drivers.launch import launch
from pipelines.interrupts import first_signal, stopping_at
from pipelines.machine import Machine
from pipelines.runs.automatic import describe_compute, is_automatic, settle, settled_config, store_config
from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.estimates import compare
from pipelines.runs.folder import RunFolder
from pipelines.runs.followers import EvaluationFollower, MetricFollower, PictureFollower
from pipelines.runs.jobs import Job, PretrainJob
from pipelines.runs.listing import Heartbeat, last_alive_s
from pipelines.runs.plans import IndexedDataset, last_step, train_plan
from pipelines.runs.progress import ProgressDisplay
from pipelines.runs.trackers import check_installed, tracking_elsewhere
from pipelines.stages import stage
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

_GOODPUT_WORDS = {
    "steps": "in steps",
    "data": "waiting for data",
    "checkpoint": "waiting for checkpoints",
    "evaluation": "copying weights for evaluations",
    "recovery": "in recovery",
    "other": "starting, evaluating and drawing",
}

_END_LIMIT_S = 3.0
"""Time for MLflow to take the end of an interrupted run, which must not wait for an outage to end."""

# (MLflow run, run folder) -> values to add to the outcome, such as the model version
Publish = Callable[[registry.Run, RunFolder], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CopiedCheckpoint:
    """Checkpoint of another run that a run starts from, and the number of steps that it stands for there."""

    source: RunFolder
    source_step: int
    step: int
    steps_per_epoch: int

    def copy_to(self, folder: RunFolder, key: str) -> None:
        """Commit it as the first checkpoint of the run with that id. Raises UserError if it is damaged."""
        try:
            found = self.source.checkpoints.load(self.source_step)
        except UserError as error:
            raise UserError(f"{error}; try --model with the run's model version, without optimizer state") from None
        meta = {"steps_per_epoch": self.steps_per_epoch, "last": found.meta["last"], "run": key}
        folder.checkpoints.save(Checkpoint(step=self.step, files=found.files, meta=meta), Retention(newest=1))


@dataclass(frozen=True, kw_only=True)
class PublishedJob:
    """A job with its run's name, its indexed dataset, its input files, and the function that publishes its result."""

    name: str
    kind: registry.Kind
    job: Job
    dataset: IndexedDataset
    publish: Publish
    inputs: dict[str, bytes] = field(default_factory=dict)
    """Files that the workers read from the run folder: content by path."""
    first_checkpoint: CopiedCheckpoint | None = None
    """What the run starts from, unless it has checkpoints already."""
    backbone: registry.ModelRef | None = None
    parent: registry.Run | None = None
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run in MLflow."""


def drive(
    jobs: Sequence[PublishedJob], group_name: str, tracking: registry.Tracking, *, fresh: bool
) -> list[dict[str, Any]]:
    """Run all unfinished jobs in one worker group, publish them, and return the outcomes of all jobs.

    The call is idempotent. After a driver was killed, training resumes from the newest checkpoint, and publishing
    finds what is already published. Raises UserError for wrong input, before anything is written, RunFailed if the
    worker group fails, and Interrupted, which says how far the first unfinished run got, after a signal.
    """
    registry.refuse_local_tracking(ray_address())
    for published in jobs:
        registry.check_run_name(published.name)
        check_installed(published.job.config.tracking)
    folders = [RunFolder(published.job.folder) for published in jobs]
    died_s = last_alive_s(folders[0].storage)
    if fresh:
        for folder in folders:
            folder.clear()
    jobs = _settled(jobs)
    runs: dict[int, registry.Run] = {}
    try:
        for i, (published, folder) in enumerate(zip(jobs, folders, strict=True)):
            key = claim(published.job, published.kind, published.dataset.manifest)
            if folder.read_outcome() is None:
                with stage("opening the run in MLflow"):
                    runs[i] = _start(published, folder, tracking, key)
        heartbeat = Heartbeat([folders[i].storage for i in runs], lambda: [run.num_waiting for run in runs.values()])
        with heartbeat, stopping_at(lambda: _progress(jobs, folders)):
            _train(jobs, runs, group_name, died_s)
            for i, run in runs.items():
                _finish(jobs[i], folders[i], run)
    except BaseException as error:
        for i, run in runs.items():
            if folders[i].read_outcome() is None:
                mark_ended(run, error)
        raise
    return [outcome for folder in folders if (outcome := folder.read_outcome()) is not None]


def _progress(jobs: Sequence[PublishedJob], folders: Sequence[RunFolder]) -> str:
    """Say how far the first unfinished run got: the step of its newest checkpoint, or that it is trained."""
    for published, folder in zip(jobs, folders, strict=True):
        if folder.read_result() is None:
            return f"{published.name} stopped at step {folder.checkpoints.latest_step()} of {_num_steps(published)}"
    unpublished = (job.name for job, folder in zip(jobs, folders, strict=True) if folder.read_outcome() is None)
    return f"{next(unpublished, jobs[-1].name)} stopped after its last step, before it was published"


def _num_steps(published: PublishedJob) -> int:
    return last_step(published.job, train_plan(published.job, published.dataset).steps_per_epoch)


def mark_ended(run: registry.Run, error: BaseException) -> None:
    """End the run in MLflow by what ended it here: as interrupted by a signal, or as failed."""
    if isinstance(error, KeyboardInterrupt):
        mark_interrupted(run, str(error))
    else:
        run.finish("FAILED")


def mark_interrupted(run: registry.Run, said: str) -> None:
    """End the run in MLflow as killed, with a tag that says by what and how far it got."""
    try:
        run.set_tags({"mae.interrupted": f"{first_signal().name}: {said}"}, _END_LIMIT_S)
        run.finish("KILLED", _END_LIMIT_S)
    except OSError as error:
        log.warning("MLflow was not told that run %s is interrupted: %s", run.name, error)


def _settled(jobs: Sequence[PublishedJob]) -> list[PublishedJob]:
    """Return the jobs with a value for every auto in their compute options, and log what they will run on."""
    if not any(is_automatic(published.job.config.compute) for published in jobs):
        return list(jobs)
    is_unfinished = any(RunFolder(published.job.folder).read_outcome() is None for published in jobs)
    # A finished run only prints its outcome, also where there is no cluster any more.
    here = machine() if is_unfinished else Machine(num_cores=1)
    settled = [dataclasses.replace(published, job=settle(published.job, here)) for published in jobs]
    if is_unfinished:
        log.info("%s", describe_compute(settled[0].job.config, settled[0].job.compute, here))
    return settled


def _train(jobs: Sequence[PublishedJob], runs: dict[int, registry.Run], group_name: str, died_s: float | None) -> None:
    """Train the unfinished jobs among those with an MLflow run, and deliver all their metrics and pictures to MLflow.

    `runs` has the MLflow run of each job by its index in `jobs`.
    """
    unfinished = [i for i in runs if RunFolder(jobs[i].job.folder).read_result() is None]
    with ExitStack() as stack:
        for i, run in runs.items():
            stack.enter_context(_following(jobs[i], RunFolder(jobs[i].job.folder), run, shows=len(runs) == 1))
        if unfinished:
            if jobs[0].job.compute.compile:
                keep_compiled(jobs[0].job.config.output)
            stack.enter_context(ray_session(jobs[0].job.compute))
            launch([(jobs[i].job, jobs[i].dataset) for i in unfinished], group_name, died_s)


def keep_compiled(output: str) -> None:
    """Let the workers of an embedded Ray keep compiled kernels beside the runs, where later runs find them.

    Torch's own place for them is below /tmp, which a container loses.
    """
    storage = open_storage(output)
    if storage.is_local:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", storage.join(".compiled"))


def _start(published: PublishedJob, folder: RunFolder, tracking: registry.Tracking, key: str) -> registry.Run:
    """Write what the job starts from into its folder, and create its MLflow run or reopen the one with that key."""
    _check_checkpoint_owner(folder, key)
    for path, content in published.inputs.items():
        folder.storage.write(path, content)
    if published.first_checkpoint is not None and not folder.checkpoints.steps():
        published.first_checkpoint.copy_to(folder, key)
    run = tracking.run(
        published.name,
        published.kind,
        shown_config(published.job),
        tags={"mae.folder": published.job.folder, **published.tags},
        dataset=published.dataset.manifest,
        dataset_uri=published.job.config.data.uri,
        parent=published.parent,
        key=key,
    )
    if published.backbone is not None:
        # For `mae register`, which may run where no registry knows the backbone.
        folder.storage.write(f"backbone/{registry.PROVENANCE}", _provenance(published).to_json())
        run.log_model_input(published.backbone)
    return run


def shown_config(job: Job) -> dict[str, Any]:
    """Return the config as MLflow shows it: with the options of preparing only if they have been used for this run."""
    values = to_dict(settled_config(job))
    if not job.config.data.cache:
        values.pop("prepare", None)
    return values


def _provenance(published: PublishedJob) -> registry.Provenance:
    digest = published.dataset.manifest.digest
    return registry.Provenance.trained_from(published.backbone, model=f"run {published.name}", dataset=digest)


def _check_checkpoint_owner(folder: RunFolder, key: str) -> None:
    """Raise UserError if the newest checkpoint was written by another run than the one that claimed the folder."""
    for step in folder.checkpoints.steps()[-1:]:
        try:
            run = folder.checkpoints.meta(step).get("run")
        except ValueError:
            return  # Its manifest is damaged, so the workers skip it.
        if run not in (None, key):
            raise UserError(
                f"the checkpoint of step {step} in {folder.storage.uri} was written by another run; remove it, or "
                "start again with --fresh"
            )


def claim(job: Job, kind: registry.Kind, manifest: Manifest | None) -> str:
    """Claim the job's run folder and write its config and dataset manifest; return the run's id, its key in MLflow.

    There is no manifest yet while the dataset is being prepared. Raises UserError if the folder holds another run, or
    something other than a run.
    """
    folder = RunFolder(job.folder)
    listed = job.listed if isinstance(job, PretrainJob) else ""
    assert listed or manifest is not None, "a dataset is prepared, or listed to be"
    dataset = listed or (manifest.digest if manifest is not None else "")
    key = folder.claim({"kind": kind, "config": identity(job.config), "dataset": dataset, "job": _resolved(job)})
    if folder.read_outcome() is None:
        store_config(job)
        if manifest is not None:
            folder.storage.write(f"dataset/{MANIFEST}", manifest_json(manifest))
            if listed:
                folder.write_pixels(to_dict(job.pixels))
    return key


def _resolved(job: Job) -> dict[str, Any]:
    """Return what the job resolved beyond its config, such as the normalization, without any URI.

    The backbone, whose version the config pins, decides `backbone_px`.
    """
    values = without_added_defaults(job)
    for key in ("folder", "config", "backbone", "backbone_px", "chosen"):
        values.pop(key, None)
    if values.get("listed"):
        # The source and the preparation's options decide it, but it is known only once all images are.
        values.pop("pixels")
    return values


@contextmanager
def _following(published: PublishedJob, folder: RunFolder, run: registry.Run, *, shows: bool) -> Iterator[None]:
    """Deliver the workers' metrics and pictures to MLflow while the block runs; if `shows`, display progress too."""
    with ExitStack() as stack:
        display = None
        if shows:
            display = stack.enter_context(ProgressDisplay(published.name, _num_steps(published)))
        stack.enter_context(MetricFollower(folder.storage, run, display=display))
        stack.enter_context(PictureFollower(folder.storage, run))
        config = published.job.config
        if isinstance(config, PretrainConfig) and config.evaluate.every_epochs:
            stack.enter_context(EvaluationFollower(folder.storage, run))
        id = (folder.read_identity() or {}).get("id", run.id)
        values = shown_config(published.job)
        stack.enter_context(tracking_elsewhere(config.tracking, folder.storage, published.name, id, values))
        yield


def _finish(published: PublishedJob, folder: RunFolder, run: registry.Run) -> None:
    """Publish the job's result, close its MLflow run and write its outcome into the folder."""
    if folder.storage.exists("export/config.json"):
        folder.storage.write(f"export/{registry.PROVENANCE}", _provenance(published).to_json())
    added, result = published.publish(run, folder), folder.read_result() or {}
    if isinstance(published.job.config, PretrainConfig):
        added |= compare(published.job.config, published.name, folder)
    run.finish("FINISHED")
    if shares := result.get("goodput"):
        shown = {kind: share for kind, share in shares.items() if share or kind != "evaluation"}
        parts = ", ".join(f"{share:.1%} {_GOODPUT_WORDS[kind]}" for kind, share in shown.items())
        log.info("%s: share of wall-clock time: %s", published.name, parts)
    folder.mark_published({"run": published.name, "run_id": run.id, "folder": published.job.folder, **result, **added})


def read_export(folder: RunFolder, *names: str) -> dict[str, bytes | Path]:
    """Read files of the run's export/, by name."""
    return {name: folder.storage.read(f"export/{name}") for name in names}


def newest_picture(folder: RunFolder) -> dict[str, bytes | Path]:
    """Return the newest picture of reconstructions as {"reconstructions.png": content}; empty if there is none."""
    found = folder.storage.list("pictures", suffix=".png")
    return {"reconstructions.png": folder.storage.read(found[-1][0])} if found else {}


def manifest_json(manifest: Manifest) -> bytes:
    """Serialize the manifest as JSON, the form in which run folder and registry store it."""
    return json.dumps(manifest.to_dict(), indent=1).encode()
