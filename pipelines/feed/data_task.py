"""A data task's part of a feed: turn one shuffle window into blocks of micro-batches."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import pyarrow as pa
import ray

from pipelines.feed.blocks import to_block
from pipelines.feed.buffers import BlockBuffers
from pipelines.feed.channel import FeedChannel
from pipelines.feed.listing import AnyExecutions
from pipelines.feed.segments import FeedSegment

# A block costs several milliseconds of CPU whatever its size, most of them in the feed's coordinator. So it carries
# several micro-batches of one rank: more if many ranks share the coordinator, fewer if object stores are small.
_BLOCK_BYTES = 64 * 2**20
_RANKS_FOR_MORE = 8
_BLOCKS_IN_STORE = 32
_MAX_PER_BLOCK = 64
_BUFFERS = BlockBuffers()
_SEGMENTS: dict[str, list[FeedSegment]] = {}
"""Segments of the feed that this process works for, by the feed's key."""


@dataclass(frozen=True, kw_only=True)
class FeedWork:
    """What all data tasks of a feed share."""

    channel: FeedChannel
    executions: AnyExecutions
    segments: Any
    """Reference to the list of FeedSegments in Ray's object store."""
    stops: list[int]
    """For each segment, the id after its last task."""
    ranks: tuple[int, ...]
    """Ranks that the feed serves, ascending."""
    store_bytes: float
    """Size of the smallest object store of a node."""


def blocks_of(work: FeedWork, task: int) -> Iterator[pa.Table]:
    """Yield the blocks of a task's window: of every `len(ranks)` blocks in turn, block i is for rank ranks[i].

    The first block of a segment carries one micro-batch, so that training need not wait; later ones carry more.
    """
    if work.executions.is_last(task):
        work.channel.report_all_started(work.executions.of_task(task))
    if work.channel.key not in _SEGMENTS:
        # Kept for the tasks that follow, with the metadata and plans that segments cache.
        _SEGMENTS.clear()
        _SEGMENTS[work.channel.key] = ray.get(work.segments)
    index = bisect_right(work.stops, task)
    segment = _SEGMENTS[work.channel.key][index]
    number = segment.first_window + task - (work.stops[index] - segment.num_windows)
    next_execution = work.executions.next_after(task)

    window, num_ranks = segment.open_window(number, work.ranks), len(work.ranks)
    limit = max_per_block(segment.micro_batch_bytes, num_ranks, work.store_bytes)
    first, per_block = 0, 1 if number == segment.first_window else limit
    while first < len(window):
        stop = min(first + per_block * num_ranks, len(window))
        for place in range(num_ranks):
            numbers = range(first + place, stop, num_ranks)
            # Images are decoded straight into the memory in which the block travels.
            images = _BUFFERS.take((len(numbers), *window.images_shape), window.images_dtype)
            batches = [window.micro_batch(number, memory) for number, memory in zip(numbers, images)]
            yield to_block(batches, images, next_execution)
        first, per_block = stop, min(2 * per_block, limit)


def max_per_block(micro_batch_bytes: int, num_workers: int, store_bytes: float = inf) -> int:
    """Return the largest number of micro-batches of one rank that a block carries."""
    block_bytes = min(_BLOCK_BYTES * max(1, num_workers // _RANKS_FOR_MORE), store_bytes // _BLOCKS_IN_STORE)
    return max(1, min(int(block_bytes // micro_batch_bytes), _MAX_PER_BLOCK))
