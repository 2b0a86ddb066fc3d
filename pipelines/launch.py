"""Jobs go to a Ray Train worker group, and what they spool goes to MLflow while they run."""

import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from pipelines.cluster import data_tasks_at_once
from pipelines.config import ComputeConfig
from pipelines.jobs import Job, job_to_dict, remaining_segments

log = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """A worker group gave up; the message names the cause."""


def launch(jobs: Sequence[Job], name: str) -> None:
    """Every job is finished. Raises RunFailed when workers fail more often than compute.max_failures allows.

    Checkpoints never pass through Ray Train's report(): our store is the only commit record, and a worker group
    that starts again finds in it what is left to do.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.ingest import data_config

    jobs = list(jobs)
    compute = jobs[0].config.compute
    with tempfile.TemporaryDirectory(prefix="mae-train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"jobs": [job_to_dict(job) for job in jobs]},
            torch_config=TorchConfig(backend="nccl" if compute.gpu else "gloo"),
            scaling_config=scaling(compute),
            run_config=RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=compute.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            datasets={"feed": lambda: _feed_of(jobs)},
            dataset_config=data_config(),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise RunFailed(_cause(error)) from error


def _work(config: dict[str, Any]) -> None:
    """What every rank does; only ranks import the models, which costs each of Ray's other processes seconds."""
    from pipelines.worker import work

    work(config)


def _feed_of(jobs: list[Job]) -> Any:
    """The feed of what is left of the jobs now; one that nobody reads where only results are left to be written."""
    import ray.data

    from pipelines.ingest import feed

    left = remaining_segments(jobs)
    compute = jobs[0].config.compute
    return feed(left, compute.num_workers, data_tasks_at_once(compute)) if left else ray.data.range(1)


def scaling(compute: ComputeConfig) -> Any:
    """Ray Train's view of the worker group."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=compute.num_workers,
        use_gpu=compute.gpu,
        resources_per_worker={"CPU": 1, **({"GPU": 1} if compute.gpu else {})},
        placement_strategy="SPREAD" if compute.spread else "PACK",
    )


def _cause(error: BaseException) -> str:
    """The last line of what went wrong on a worker, without Ray's wrapping."""
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
