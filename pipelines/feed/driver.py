"""The driver's part of a feed: build the datasets that Ray Train splits among the ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.feed.channel import FeedChannel
from pipelines.feed.data_task import FeedWork, blocks_of
from pipelines.feed.executions import NUM_DATASETS, Executions
from pipelines.feed.rank import micro_batches
from pipelines.feed.segments import FeedSegment

if TYPE_CHECKING:
    from pipelines.feed.windows import MicroBatch


@dataclass(frozen=True)
class Feed:
    """Datasets whose executions alternate, and the channel that its processes share."""

    channel: FeedChannel
    datasets: tuple[Any, ...]

    def micro_batches(self) -> Iterator["MicroBatch"]:
        """Yield all micro-batches to this process, the only rank."""
        return micro_batches(lambda dataset: self.datasets[dataset].iterator(), self.channel)


def feed(segments: Sequence[FeedSegment], num_workers: int, max_tasks: int | None = None, num_cpus: float = 1) -> Feed:
    """Build the datasets whose blocks hold the micro-batches of the segments, in the order of their plans.

    At most `max_tasks` tasks run at a time; without a value, as many as find their `num_cpus` free. Split among
    `num_workers` by streaming_split(equal=True), as Ray Train does, rank r gets block j where j % num_workers == r,
    which holds micro-batches of rank r. Raises UserError if a plan is for another number of workers, or if no segment
    has a step.
    """
    import ray
    import ray.data

    from pipelines.cluster import DATA_TASK
    from pipelines.feed.task_ids import TaskIds

    segments = list(segments)
    for segment in segments:
        if segment.plan.num_workers != num_workers:
            raise UserError(
                f"a plan for {segment.plan.num_workers} workers cannot feed {num_workers}; make one for {num_workers}"
            )
    stops = list(accumulate(segment.num_windows for segment in segments))
    if not stops or not stops[-1]:
        raise UserError("nothing to feed: no segment has a step; give at least one")

    resources = ray.cluster_resources()
    cpu_limit = max(1, int(resources.get("CPU", 1) / max(num_cpus, 0.1)))
    work = FeedWork(
        channel=FeedChannel(uuid4().hex),
        executions=Executions.of(stops[-1], max_tasks or cpu_limit),
        segments=segments,
        stops=stops,
        # Blocks must fit the smallest object store.
        store_bytes=min(node["Resources"].get("object_store_memory", inf) for node in ray.nodes() if node["Alive"]),
    )

    def run(ids: pa.Table) -> Iterator[pa.Table]:
        for task in ids["id"].to_pylist():
            yield from blocks_of(work, task)

    # Equal limits on both operators, or Ray Data would not fuse them into one.
    limits: dict[str, Any] = {
        "concurrency": max_tasks,
        "num_cpus": num_cpus,
        "resources": {DATA_TASK: 1} if DATA_TASK in resources else {},
    }

    def dataset_of(number: int) -> Any:
        # With fewer tasks than the requested blocks, Ray would split each block.
        ids = ray.data.read_datasource(TaskIds(work.executions, work.channel, number), override_num_blocks=1, **limits)
        dataset = ids.map_batches(run, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **limits)
        # One output row a block, in order.
        dataset.context.target_max_block_size = 1
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        # Each task would start a thread that polls its memory, which nobody reads.
        dataset.context.memory_usage_poll_interval_s = None
        # Ray Data ends an execution whose blocks nobody takes for 30 minutes, as during a long fit of a probe. A worker
        # that hangs is found by `compute.stall_s`.
        dataset.context.execution_no_progress_timeout_s = -1
        return dataset

    return Feed(work.channel, tuple(dataset_of(number) for number in range(NUM_DATASETS)))


def data_config() -> Any:
    """Return the DataConfig with which Ray Train must run a feed: blocks in order, split evenly."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig

    return DataConfig(datasets_to_split="all", execution_options=ExecutionOptions(preserve_order=True))
