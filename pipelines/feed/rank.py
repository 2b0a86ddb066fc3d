"""A rank's part of a feed: turn blocks into micro-batches, and start the next execution in time."""

import threading
from collections.abc import Callable, Iterator
from itertools import chain
from queue import Queue
from typing import TYPE_CHECKING, Any, TypeAlias

from pipelines.feed.blocks import from_block, next_execution
from pipelines.feed.channel import FeedChannel
from pipelines.feed.executions import NUM_DATASETS

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.feed.micro_batch import MicroBatch

_Blocks: TypeAlias = "Queue[pa.Table | BaseException | None]"
Begin: TypeAlias = Callable[[int], bool]


def micro_batches(
    iterator_of: Callable[[int], Any], channel: FeedChannel, begin: Begin = lambda execution: True
) -> Iterator["MicroBatch"]:
    """Yield this rank's micro-batches as they become ready; their tensors must not be written to.

    `iterator_of` returns this rank's iterator of a dataset of the feed. `begin` waits until an execution may begin and
    returns whether there is one.
    """
    return chain.from_iterable(from_block(block) for block in blocks(iterator_of, channel, begin))


def blocks(
    iterator_of: Callable[[int], Any],
    channel: FeedChannel,
    begin: Begin = lambda execution: True,
    *,
    prefetch: int = 2,
) -> Iterator["pa.Table"]:
    """Yield the blocks of this rank's micro-batches.

    Data tasks start at once, not when the first block is asked for, so that they work while the model is built.
    """

    def start(execution: int) -> _Blocks:
        return _start(channel, execution, iterator_of, begin, prefetch)

    return _drain(channel, start(0), start)


def _drain(channel: FeedChannel, first: _Blocks, start: Callable[[int], _Blocks]) -> Iterator["pa.Table"]:
    """Yield the blocks of one execution after another, each started as soon as the channel allows it."""
    following: _Blocks | None = first
    while following is not None:
        arriving, following = following, None
        while (block := arriving.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            execution = next_execution(block)
            if execution and following is None and channel.all_started(execution - 1):
                following = start(execution)
            yield block


def _start(
    channel: FeedChannel, execution: int, iterator_of: Callable[[int], Any], begin: Begin, prefetch: int
) -> _Blocks:
    """Start an execution and return the queue in which a thread puts its blocks; None comes after the last."""
    arriving: _Blocks = Queue(maxsize=1)

    def pump() -> None:
        try:
            if not begin(execution):
                arriving.put(None)
                return
            channel.select(execution)
            iterator = iterator_of(execution % NUM_DATASETS)
            for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
                for i in range(table.num_rows):
                    arriving.put(table.slice(i, 1))
            arriving.put(None)
        except BaseException as error:
            arriving.put(error)

    threading.Thread(target=pump, name=f"feed-{execution}", daemon=True).start()
    return arriving
