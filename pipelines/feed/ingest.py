"""Prepared shards become micro-batches on every rank, in the order of the epoch plan.

The unit of work is a shuffle window: one Ray task reads its row groups once, decodes and crops, and yields what is
ready. A feed spans all segments of a job, so that nothing waits between epochs. Only tasks and ranks load torch:
it would cost each of Ray Data's own processes two seconds.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from queue import Queue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from mae_core.errors import UserError
from pipelines.feed.blocks import from_row, next_chapter, to_row
from pipelines.feed.buffers import RowMemory
from pipelines.feed.chapters import NUM_TURNS, Chapters, begin, is_under_way
from pipelines.feed.segments import Segment

if TYPE_CHECKING:
    from pipelines.feed.windows import MicroBatch

# A row of the feed costs the machine several milliseconds whatever its size, and the one driver of the feed most of
# them, so one row carries several micro-batches of one rank; where many ranks share the driver, more, and fewer where
# object stores are small. The first of a segment carries one, so that training need not wait.
_ROW_BYTES = 64 * 2**20
_RANKS_FOR_MORE = 8
_ROWS_IN_STORE = 32
_MAX_PER_ROW = 16
_MEMORY = RowMemory()
_KEPT: dict[str, list[Segment]] = {}
"""Segments of the feed that this process works for, by its key."""


@dataclass(frozen=True)
class Source:
    """What ranks read a feed from: datasets of rows that hold micro-batches, which take turns (see `chapters.py`)."""

    key: str
    datasets: tuple[Any, ...]

    def micro_batches(self) -> Iterator["MicroBatch"]:
        """All of them, where this process is the only rank."""
        return micro_batches(lambda turn: self.datasets[turn].iterator(), self.key)


def feed(segments: Sequence[Segment], num_workers: int, max_tasks: int | None = None, num_cpus: float = 1) -> Source:
    """Rows that hold micro-batches, in the order of the segments and of their plans.

    At most `max_tasks` tasks run at a time; without a value as many as find their `num_cpus` free.

    Split among `num_workers` by streaming_split(equal=True), as Ray Train does, rank r gets row j where
    j % num_workers == r, which holds micro-batches of rank r. Raises UserError where a plan is for another number of
    workers, or nothing is left to feed.
    """
    segments = list(segments)
    for segment in segments:
        if segment.plan.num_workers != num_workers:
            raise UserError(f"a plan for {segment.plan.num_workers} workers cannot feed {num_workers}; make it anew")
    stops, store_bytes = list(accumulate(segment.num_windows for segment in segments)), _store_bytes()
    if not stops or not stops[-1]:
        raise UserError("nothing to feed: no segment has a step; give at least one")
    chapters = Chapters.of(uuid4().hex, stops[-1], max_tasks or _most_tasks(num_cpus))

    def run(block: pa.Table) -> Iterator[pa.Table]:
        here = _kept(chapters.key, segments)
        for task in block["id"].to_pylist():
            chapters.started(task)
            place = bisect_right(stops, task)
            segment = here[place]
            window = segment.first_window + task - (stops[place] - segment.num_windows)
            yield from _rows(segment, window, store_bytes, chapters.next_after(task))

    # Equal limits on both, or they would not become one operator.
    limits: dict[str, Any] = {"concurrency": max_tasks, "num_cpus": num_cpus, "resources": _resources()}
    return Source(chapters.key, tuple(_dataset(chapters, turn, run, limits) for turn in range(NUM_TURNS)))


def _dataset(chapters: Chapters, turn: int, run: Callable[[pa.Table], Iterator[pa.Table]], limits: Any) -> Any:
    import ray.data

    from pipelines.feed.tasks import Numbers

    # Of more blocks than there are tasks Ray would split each.
    dataset = ray.data.read_datasource(Numbers(chapters, turn), override_num_blocks=1, **limits).map_batches(
        run, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **limits
    )
    _configure(dataset.context)
    return dataset


def _kept(key: str, segments: list[Segment]) -> list[Segment]:
    """The segments as this process first got them: each task gets copies, which have neither read where row groups lie
    nor shuffled the epoch."""
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = segments
    return _KEPT[key]


def data_config() -> Any:
    """How Ray Train must run a feed: in order, split evenly."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig

    return DataConfig(datasets_to_split="all", execution_options=ExecutionOptions(preserve_order=True))


def micro_batches(shard: Callable[[int], Any], key: str, *, prefetch: int = 2) -> Iterator["MicroBatch"]:
    """This rank's micro-batches as they become ready; their tensors must not be written to.

    `shard` is this rank's iterator of the dataset of a turn. Data tasks start at once, not when the first is asked for,
    so that they work while the model is built.
    """
    return _drain(key, _begun(key, 0, shard, prefetch), partial(_begun, shard=shard, prefetch=prefetch))


_Rows = Queue["pa.Table | BaseException | None"]


def _drain(key: str, rows: _Rows, begun: Callable[[str, int], _Rows]) -> Iterator["MicroBatch"]:
    """The micro-batches of the chapter with these rows and of those after it, each begun as soon as may be."""
    following: _Rows | None = rows
    while following is not None:
        rows, following = following, None
        while (row := rows.get()) is not None:
            if isinstance(row, BaseException):
                raise row
            chapter = next_chapter(row)
            if chapter and following is None and is_under_way(key, chapter - 1):
                following = begun(key, chapter)
            yield from from_row(row)


def _begun(key: str, chapter: int, shard: Callable[[int], Any], prefetch: int) -> _Rows:
    """The chapter's rows, as a thread reads them; None behind the last."""
    rows: _Rows = Queue(maxsize=1)

    def pump() -> None:
        try:
            begin(key, chapter)
            iterator = shard(chapter % NUM_TURNS)
            for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
                for i in range(table.num_rows):
                    rows.put(table.slice(i, 1))
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    threading.Thread(target=pump, name=f"feed-{chapter}", daemon=True).start()
    return rows


def _configure(context: Any) -> None:
    """One output row a block, in order."""
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Each task would start a thread that asks the system for its memory, which no one reads.
    context.memory_usage_poll_interval_s = None


def _store_bytes() -> float:
    """Of the smallest object store of a node."""
    import ray

    return min(node["Resources"].get("object_store_memory", inf) for node in ray.nodes() if node["Alive"])


def _resources() -> dict[str, float]:
    """What each task asks for beside CPUs."""
    import ray

    from pipelines.cluster import DATA_TASK

    return {DATA_TASK: 1} if DATA_TASK in ray.cluster_resources() else {}


def _most_tasks(num_cpus: float) -> int:
    """Tasks that may find their CPUs free at a time."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1) / max(num_cpus, 0.1)))


def most_per_row(micro_batch_bytes: int, num_workers: int, store_bytes: float = inf) -> int:
    """Micro-batches of one rank that a row of the feed carries at most."""
    row_bytes = min(_ROW_BYTES * max(1, num_workers // _RANKS_FOR_MORE), store_bytes // _ROWS_IN_STORE)
    return max(1, min(int(row_bytes // micro_batch_bytes), _MAX_PER_ROW))


def _rows(segment: Segment, window: int, store_bytes: float, following: int) -> Iterator[pa.Table]:
    """The window's micro-batches in rows: of every `num_workers` rows in turn, row r holds some of rank r."""
    from pipelines.feed.windows import Window

    opened, num_workers = Window(segment, window), segment.plan.num_workers
    most = most_per_row(segment.micro_batch_bytes, num_workers, store_bytes)
    first, per_row = 0, 1 if window == segment.first_window else most
    while first < len(opened):
        stop = min(first + per_row * num_workers, len(opened))
        for rank in range(num_workers):
            numbers = range(first + rank, stop, num_workers)
            # All images of a row are written where they stay.
            images = _MEMORY.take((len(numbers), *opened.images_shape))
            batches = [opened.micro_batch(number, memory) for number, memory in zip(numbers, images)]
            yield to_row(batches, images, following)
        first, per_row = stop, min(2 * per_row, most)
