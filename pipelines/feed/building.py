"""Build a feed: the datasets of a group of ranks, whose coordinators and data tasks are on the node of the group.

The first rank of each node builds the feed of its node, so that no process has work that grows with the cluster.
"""

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
from pipelines.feed.listing import AnyExecutions, ListedExecutions, ListedSegment
from pipelines.feed.rank import blocks, micro_batches
from pipelines.feed.segments import FeedSegment

if TYPE_CHECKING:
    from pipelines.feed.micro_batch import MicroBatch

_NODE_ID = "ray.io/node-id"
"""Label that Ray gives to every node."""


@dataclass(frozen=True)
class RankFeed:
    """One rank's part of a feed, which may be sent to the process of the rank."""

    channel: FeedChannel
    iterators: tuple[Any, ...]
    """The rank's iterator of every dataset."""
    executions: AnyExecutions

    def micro_batches(self) -> Iterator["MicroBatch"]:
        """Yield the rank's micro-batches as they become ready; their tensors must not be written to."""
        return micro_batches(self.iterators.__getitem__, self.channel, self.executions.begin)

    def blocks(self) -> Iterator[pa.Table]:
        """Yield the blocks of these micro-batches, without importing torch."""
        return blocks(self.iterators.__getitem__, self.channel, self.executions.begin)


@dataclass(frozen=True)
class Feed:
    """Datasets whose executions alternate, and the channel that its processes share."""

    channel: FeedChannel
    datasets: tuple[Any, ...]
    ranks: tuple[int, ...]
    executions: AnyExecutions

    def micro_batches(self) -> Iterator["MicroBatch"]:
        """Yield all micro-batches to this process, the only rank."""
        return micro_batches(lambda dataset: self.datasets[dataset].iterator(), self.channel, self.executions.begin)

    def split(self) -> dict[int, RankFeed]:
        """Return the part of each rank, from one coordinator per dataset.

        Ray Data starts the coordinators on this node and ends them with this process.
        """
        splits = [dataset.streaming_split(len(self.ranks), equal=True) for dataset in self.datasets]
        return {
            rank: RankFeed(self.channel, iterators, self.executions)
            for rank, iterators in zip(self.ranks, zip(*splits))
        }


def feed(
    segments: Sequence[FeedSegment],
    num_workers: int,
    max_tasks: int | None = None,
    num_cpus: float = 1,
    *,
    ranks: Sequence[int] | None = None,
    node: str = "",
) -> Feed:
    """Build the datasets whose blocks hold the micro-batches of the segments, in the order of their plans.

    With `ranks`, ascending, only the micro-batches of these of the `num_workers` ranks. At most `max_tasks` tasks run
    at a time; without a value, as many as find their `num_cpus` free. They run on `node` while it has CPUs free, then
    on others; without a node, anywhere. Block j is for the rank at j % len(ranks), as streaming_split(equal=True) deals
    them. Raises UserError if a plan is for another number of workers, or if no segment has a step.
    """
    import ray.data

    from pipelines.cluster import DATA_TASK
    from pipelines.feed.task_ids import TaskIds
    from pipelines.ray_data import configure

    segments = list(segments)
    for segment in segments:
        if segment.plan.num_workers != num_workers:
            raise UserError(
                f"a plan for {segment.plan.num_workers} workers cannot feed {num_workers}; make one for {num_workers}"
            )
    stops = list(accumulate(segment.num_windows for segment in segments))
    if not stops or not stops[-1]:
        raise UserError("nothing to feed: no segment has a step; give at least one")

    ranks = tuple(range(num_workers) if ranks is None else ranks)
    resources = ray.cluster_resources()
    cpu_limit = max(1, int(resources.get("CPU", 1) / max(num_cpus, 0.1)))
    channel = FeedChannel(uuid4().hex)
    executions: AnyExecutions = Executions.of(stops[-1], max_tasks or cpu_limit)
    if isinstance(segments[0], ListedSegment):
        assert len(segments) == 1, "a listed epoch ends with the group"
        executions = ListedExecutions(executions, channel, segments[0].windows)
    work = FeedWork(
        channel=channel,
        executions=executions,
        segments=ray.put(segments),
        stops=stops,
        ranks=ranks,
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
    if node:
        limits |= {"label_selector": {_NODE_ID: node}, "fallback_strategy": [{"label_selector": {}}]}

    def dataset_of(number: int) -> Any:
        # With fewer tasks than the requested blocks, Ray would split each block.
        ids = ray.data.read_datasource(TaskIds(work.executions, work.channel, number), override_num_blocks=1, **limits)
        dataset = ids.map_batches(run, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **limits)
        configure(dataset)
        # One output row a block, in order.
        dataset.context.target_max_block_size = 1
        dataset.context.execution_options.preserve_order = True
        # Each task would start a thread that polls its memory, which nobody reads.
        dataset.context.memory_usage_poll_interval_s = None
        return dataset

    # A dataset without an execution would only cost a coordinator.
    num_datasets = min(NUM_DATASETS, work.executions.count)
    return Feed(work.channel, tuple(dataset_of(number) for number in range(num_datasets)), ranks, executions)
