"""Run jobs in a Ray Train worker group: restart it after failures, stop it, report why it ended."""

import gc
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.config import FixedCompute
from pipelines.console import log_to_driver
from pipelines.drivers.feeding import open_feed
from pipelines.errors import CommandFailed
from pipelines.interrupts import wait_for
from pipelines.runs.automatic import with_stored_micro_batch
from pipelines.runs.failures import cause_of, failure_recorder
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Job, PretrainJob
from pipelines.runs.plans import IndexedJob
from pipelines.runs.stopping import StopRequest
from pipelines.stages import note, saying

log = logging.getLogger(__name__)


class RunFailed(CommandFailed):
    """The worker group ended with unfinished jobs; the message names the cause."""


def launch(
    indexed: Sequence[IndexedJob], name: str, died_s: float | None = None, stop: StopRequest | None = None
) -> None:
    """Run every job to its end in one worker group, or until `stop` is made; a signal to this process makes it.

    `died_s` is when the previous driver of the run was last alive, in Unix seconds. Raises RunFailed if workers fail
    more often than compute.max_failures allows, or if a job cannot continue. Raises Interrupted after a signal, once
    the group has saved a checkpoint of its present step, or compute.grace_s is over.

    Checkpoints never pass through Ray Train's report(): the run folder is the only commit record, and a restarted
    worker group reads from it what remains to be done.
    """
    request = stop or StopRequest.new()
    grace_s = indexed[0][0].config.compute.grace_s
    wait_for(lambda: _launch(indexed, name, died_s, request), lambda: request.make_and_allow(grace_s))


def _launch(indexed: Sequence[IndexedJob], name: str, died_s: float | None, stop: StopRequest) -> None:
    import ray

    jobs = [job for job, _ in indexed]
    folders = [RunFolder(job.folder) for job in jobs]
    attempt = {"launched_s": time.time(), "died_s": died_s}
    # One object for every group that is launched or restarted. By value, the indexes would be sent to each rank.
    stored = ray.put(list(indexed))
    while True:
        for folder in folders:
            folder.clear_stop_reason()
            folder.clear_restart_request()
        _fit(jobs, stored, name, attempt, stop)
        causes = [cause for folder in folders if (cause := folder.restart_reason())]
        if not causes:
            break
        log.warning("%s; restarting the workers from the newest intact checkpoint", causes[0])
        jobs = [with_stored_micro_batch(job) for job in jobs]
        stored = ray.put([(job, dataset) for job, (_, dataset) in zip(jobs, indexed)])
    for folder in folders:
        if cause := folder.stop_reason():
            raise RunFailed(cause)


def _fit(jobs: list[Job], stored: Any, name: str, attempt: dict[str, Any], stop: StopRequest) -> None:
    """Run one worker group, which Ray Train restarts after failures, until it ends, stops or needs another feed.

    `stored` is the ObjectRef of the jobs with their indexed datasets.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, WorkerGroupError

    from pipelines.drivers.process_group import ProcessGroup
    from pipelines.drivers.trainer import Trainer

    compute = jobs[0].compute
    # The controller inherits this environment. It treats a worker that does not answer for this long as hung.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(compute.stall_s)
    # While rank 0 retries a checkpoint or waits for the last evaluation, it still answers, but the others wait for it
    # in a collective: allow all these times.
    joining_s = compute.stall_s + max(map(_longest_wait_s, jobs))
    with tempfile.TemporaryDirectory(prefix="mae-train-") as scratch:
        trainer = Trainer(
            _work,
            train_loop_config={"jobs": stored, "attempt": attempt, "stop": stop},
            backend_config=ProcessGroup("nccl" if compute.gpu else "gloo", timeout_s=max(1, math.ceil(joining_s))),
            scaling_config=scaling(compute),
            run_config=RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=compute.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[failure_recorder([job.folder for job in jobs], compute.max_failures)],
            ),
        )
        try:
            with saying("waiting for the workers", lambda: _has_begun(stop)):
                trainer.fit()
        except WorkerGroupError as error:
            raise RunFailed(
                f"{cause_of(error.worker_failures)}; that is more than the {compute.max_failures} failures that "
                "compute.max_failures allows; rerun the same command to resume from the newest checkpoint"
            ) from error
        except Exception as error:
            raise RunFailed(_cause(error)) from error


def _has_begun(stop: StopRequest) -> bool:
    """Return whether the workers have begun, or the cluster that knows it does not answer."""
    try:
        return stop.is_work_reported()
    except Exception:
        return True


def _longest_wait_s(job: Job) -> float:
    """Return the seconds for which rank 0 may keep the others waiting although nothing is wrong with it."""
    wait_s = job.config.checkpoint.patience_s
    if isinstance(job, PretrainJob) and job.config.evaluate.every_epochs:
        wait_s += job.config.evaluate.wait_s
    return wait_s


def _work(config: dict[str, Any]) -> None:
    """Run a rank: start the feed, whose data tasks work while this process imports the rest and builds the model.

    The import is here because importing torch would cost each of Ray's other processes 1.5 to 2 s.
    """
    import ray
    import ray.train

    called_s = time.time()
    log_to_driver()
    context = ray.train.get_context()
    feed = open_feed(ray.get(config["jobs"]), context.get_world_rank(), context.get_world_size())
    imported_s = time.time()
    with light_imports():
        from pipelines.worker import work

    if context.get_world_rank() == 0:
        note("starting the workers", config["attempt"]["launched_s"], called_s)
        note("starting the feed", called_s, imported_s)
        note("importing the worker's modules", imported_s)
    work(config, feed.batches, feed.group, feed.first_steps)


@contextmanager
def light_imports() -> Iterator[None]:
    """Import in the block without garbage collection, and without wandb, which timm imports wherever it is installed.

    The modules of torch and timm live as long as the process; walking over them again and again as they load is a
    seventh of the CPU time of the import, and later collections need not walk over them either.
    """
    hides_wandb = "wandb" not in sys.modules
    if hides_wandb:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType] -- Python's way to say that it is not there
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hides_wandb:
            del sys.modules["wandb"]


def scaling(compute: FixedCompute) -> Any:
    """Return Ray Train's description of the worker group: size, resources and placement."""
    from ray.train import ScalingConfig

    least = compute.min_workers
    return ScalingConfig(
        num_workers=compute.num_workers if least is None else (least, compute.num_workers),
        use_gpu=compute.gpu,
        resources_per_worker={"CPU": 1, **({"GPU": 1} if compute.gpu else {})},
        placement_strategy="SPREAD" if compute.spread else "PACK",
    )


def _cause(error: BaseException) -> str:
    """Return the last line of an error, which holds the cause; Ray's wrapping precedes it."""
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
