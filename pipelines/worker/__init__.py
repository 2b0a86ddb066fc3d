"""What runs on one rank: the jobs of a worker group, one after another, on one feed."""

import faulthandler
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipelines.console import log_to_driver
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Job, PretrainJob, with_workers
from pipelines.runs.plans import IndexedDataset, IndexedJob, ListedDataset
from pipelines.worker import finetuning, neighbours, pretraining, probing
from pipelines.worker.goodput import Attempt, Clock
from pipelines.worker.rank import Feed, Rank, join_group
from pipelines.worker.recorder import Stopped
from pipelines.worker.resuming import RestartRequested, load_newest
from pipelines.worker.staging import staged
from pipelines.worker.stop_gate import StopGate, StopRequested

log = logging.getLogger(__name__)


def work(config: dict[str, Any], batches: Iterator[MicroBatch], group: str, first_steps: Sequence[int | None]) -> None:
    """Run every unfinished job of the group to its end, or until the driver asks it to stop.

    Each rank of the group calls it, with its micro-batches. `group` names this start of the group in all of the
    cluster, and a job whose step is None in `first_steps` has ended.
    """
    import ray

    log_to_driver()
    # Harmless: DDP compares the stride of a dimension of size 1, which the patch projection has for one channel.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    jobs: list[IndexedJob] = ray.get(config["jobs"])
    try:
        _run_jobs(jobs, config, batches, group, first_steps)
    finally:
        # Ray ends the process now, sometimes with a crash in its threads: nothing of ours, so no stack on the terminal.
        faulthandler.disable()


def _run_jobs(
    jobs: list[IndexedJob],
    config: dict[str, Any],
    batches: Iterator[MicroBatch],
    group: str,
    first_steps: Sequence[int | None],
) -> None:
    rank = join_group(jobs[0][0].compute)
    attempt = Attempt(**config["attempt"])
    with StopGate(config["stop"], group, rank.index, rank.world) as gate:
        feed = Feed(staged(batches, rank.device), gate.enter, gate.is_held)
        for (job, dataset), step in zip(jobs, first_steps, strict=True):
            if step is None:
                continue
            try:
                run_job(with_workers(job, rank.world), dataset, rank, feed, attempt)
            except (Stopped, RestartRequested, StopRequested):
                # The driver knows the reason, or finds it in the run folder. Ray Train would restart after an error.
                return
            attempt = Attempt(launched_s=time.time())


def run_job(job: Job, dataset: IndexedDataset | ListedDataset, rank: Rank, feed: Feed, attempt: Attempt) -> None:
    """Run the job from its newest checkpoint to its end and write its result into its folder.

    While its dataset is being prepared, run the first epoch, which ends with a checkpoint.

    Raises Stopped if it cannot continue, RestartRequested if its newest checkpoint is damaged, and StopRequested, after
    saving a checkpoint, if the driver asks for it.
    """
    started_s = time.monotonic()
    folder = RunFolder(job.folder)
    checkpoint = load_newest(folder, rank)
    feed.clock = Clock.started(attempt, checkpoint.meta.get("clock") if checkpoint else None)
    if checkpoint:
        rank.log(log, "resuming %s at step %d with %d workers", job.folder, checkpoint.step, rank.world)
    torch.manual_seed(job.config.seed)
    if isinstance(dataset, ListedDataset):
        assert isinstance(job, PretrainJob), "classifiers train on prepared datasets"
        pretraining.run_listed_epoch(job, dataset, rank, feed, folder, checkpoint)
        rank.barrier()
        return
    if isinstance(job, PretrainJob):
        found = pretraining.run(job, dataset, rank, feed, folder, checkpoint)
    elif job.config.classifier.method == "finetune":
        found = finetuning.run(job, dataset, rank, feed, folder, checkpoint)
    elif job.config.classifier.method == "knn":
        found = neighbours.run(job, dataset, rank, feed, folder)
    else:
        found = probing.run(job, dataset, rank, feed, folder, checkpoint)
    if rank.is_main:
        shares = {kind: round(share, 4) for kind, share in feed.clock.shares().items()}
        folder.mark_trained(
            found
            | {
                "duration_s": round(time.monotonic() - started_s, 1),
                "goodput": shares,
                "failures": len(folder.read_failures()),
            }
        )
    rank.barrier()
