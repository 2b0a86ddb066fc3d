"""Open a rank's part of the feed of its node, which the first rank of the node builds. Imports none of the worker."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from pipelines.cluster import quiet_ray
from pipelines.drivers.data_tasks import data_tasks
from pipelines.drivers.process_group import gather
from pipelines.feed.building import RankFeed, feed
from pipelines.runs.jobs import with_workers
from pipelines.runs.plans import IndexedJob, first_steps, remaining_segments

if TYPE_CHECKING:
    from pipelines.feed.micro_batch import MicroBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenFeed:
    """What a rank trains on, once its worker group has started."""

    batches: Iterator["MicroBatch"]
    """The rank's micro-batches of all jobs."""
    group: str
    """Names this start of the group in all of the cluster."""
    first_steps: Sequence[int | None]
    """The step from which each job continues; None if it has ended."""


def open_feed(jobs: Sequence[IndexedJob], index: int, world: int) -> OpenFeed:
    """Open the feed of rank `index` of `world`; every rank must call it.

    Each node has a feed of its own. The first rank of the node owns its coordinators, which end when its process does.
    """
    import ray

    is_main = index == 0
    mine = (ray.get_runtime_context().get_node_id(), uuid4().hex, first_steps(jobs) if is_main else [])
    found = gather(mine)
    nodes, (node, _, _), (_, group, steps) = [other for other, _, _ in found], mine, found[0]
    left = remaining_segments([(with_workers(job, world), dataset) for job, dataset in jobs], steps)
    if not left:  # Perhaps only the export is left to do.
        return OpenFeed(iter(()), group, steps)
    limits = gather(data_tasks(jobs[0][0].compute, nodes) if is_main else {})[0]
    ranks = [number for number, other in enumerate(nodes) if other == node]
    if is_main and len(ranks) < world and jobs[0][0].config.data.lanes == 1:
        log.info("each of the %d nodes reads all images; see data.lanes in docs/scaling.md", len(set(nodes)))
    built: dict[int, RankFeed] = {}
    if index == ranks[0]:
        quiet_ray()
        built = feed(left, world, *limits[node], ranks=ranks, node=node).split()
    part = next(parts[index] for parts in gather(built) if index in parts)
    return OpenFeed(part.micro_batches(), group, steps)
