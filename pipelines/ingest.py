"""Prepared shards become micro-batches on every rank, in the order of the epoch plan.

The unit of work is a shuffle window: one Ray task reads its row groups once, decodes and crops, and yields what is
ready. One dataset spans all segments of a job, so that nothing waits between epochs. Only tasks and ranks load torch:
it would cost each of Ray Data's own processes two seconds.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.row_memory import RowMemory
from pipelines.segments import Segment

if TYPE_CHECKING:
    from pipelines.windows import MicroBatch

# A row of the feed costs the machine several milliseconds whatever its size, and the one driver of the feed most of
# them, so one row carries several micro-batches of one rank; where many ranks share the driver, more, and fewer where
# object stores are small. The first of a segment carries one, so that training need not wait.
_ROW_BYTES = 64 * 2**20
_RANKS_FOR_MORE = 8
_ROWS_IN_STORE = 32
_MAX_PER_ROW = 16
_MEMORY = RowMemory()


def feed(segments: Sequence[Segment], num_workers: int, max_tasks: int | None = None, num_cpus: float = 1) -> Any:
    """One ray.data.Dataset of rows that hold micro-batches, in the order of the segments and of their plans.

    At most `max_tasks` tasks run at a time; without a value as many as find their `num_cpus` free.

    Split among `num_workers` by streaming_split(equal=True), as Ray Train does, rank r gets row j where
    j % num_workers == r, which holds micro-batches of rank r. Raises ValueError where a plan is for another number of
    workers, or nothing is left to feed.
    """
    import ray.data

    from pipelines.tasks import Numbers

    segments = list(segments)
    for segment in segments:
        if segment.plan.num_workers != num_workers:
            raise ValueError(f"a plan for {segment.plan.num_workers} workers cannot feed {num_workers}; make it anew")
    stops, store_bytes = list(accumulate(segment.num_windows for segment in segments)), _store_bytes()
    num_tasks = stops[-1] if stops else 0
    if not num_tasks:
        raise ValueError("nothing to feed: no segment has a step; give at least one")

    def run(block: pa.Table) -> Iterator[pa.Table]:
        for task in block["id"].to_pylist():
            place = bisect_right(stops, task)
            segment = segments[place]
            yield from _rows(segment, segment.first_window + task - (stops[place] - segment.num_windows), store_bytes)

    # Equal limits on both, or they would not become one operator.
    limits: dict[str, Any] = {"concurrency": max_tasks, "num_cpus": num_cpus}
    dataset = ray.data.read_datasource(Numbers(num_tasks), override_num_blocks=num_tasks, **limits).map_batches(
        run, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **limits
    )
    _configure(dataset.context)
    return dataset


def data_config() -> Any:
    """How Ray Train must run a feed: in order, split evenly."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig

    return DataConfig(datasets_to_split="all", execution_options=ExecutionOptions(preserve_order=True))


def micro_batches(iterator: Any, *, prefetch: int = 2) -> Iterator["MicroBatch"]:
    """This rank's micro-batches as they become ready; their tensors must not be written to.

    Data tasks start at once, not when the first is asked for, so that they work while the model is built.
    """
    rows: Queue[pa.Table | BaseException | None] = Queue(maxsize=1)
    threading.Thread(target=_pump, args=(iterator, prefetch, rows), name="feed", daemon=True).start()
    return _drain(rows)


def _pump(iterator: Any, prefetch: int, rows: "Queue[pa.Table | BaseException | None]") -> None:
    try:
        for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
            for i in range(table.num_rows):
                rows.put(table.slice(i, 1))
        rows.put(None)
    except BaseException as error:
        rows.put(error)


def _drain(rows: "Queue[pa.Table | BaseException | None]") -> Iterator["MicroBatch"]:
    while (row := rows.get()) is not None:
        if isinstance(row, BaseException):
            raise row
        yield from _from_row(row)


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


def most_per_row(micro_batch_bytes: int, num_workers: int, store_bytes: float = inf) -> int:
    """Micro-batches of one rank that a row of the feed carries at most."""
    row_bytes = min(_ROW_BYTES * max(1, num_workers // _RANKS_FOR_MORE), store_bytes // _ROWS_IN_STORE)
    return max(1, min(int(row_bytes // micro_batch_bytes), _MAX_PER_ROW))


def _rows(segment: Segment, window: int, store_bytes: float) -> Iterator[pa.Table]:
    """The window's micro-batches in rows: of every `num_workers` rows in turn, row r holds some of rank r."""
    from pipelines.windows import Window

    opened, num_workers = Window(segment, window), segment.plan.num_workers
    most = most_per_row(segment.micro_batch_bytes, num_workers, store_bytes)
    first, per_row = 0, 1 if window == segment.first_window else most
    while first < len(opened):
        stop = min(first + per_row * num_workers, len(opened))
        for rank in range(num_workers):
            numbers = range(first + rank, stop, num_workers)
            # All images of a row are written where they stay.
            images = _MEMORY.take((len(numbers), *opened.images_shape))
            yield _to_row([opened.micro_batch(number, memory) for number, memory in zip(numbers, images)], images)
        first, per_row = stop, min(2 * per_row, most)


def _to_row(batches: Sequence["MicroBatch"], images: NDArray[np.uint8]) -> pa.Table:
    """One row of lists, those of the micro-batches end to end."""
    columns = {"images": images.reshape(-1), "shape": np.array(images.shape[1:], dtype=np.int64)}
    for name in _TENSORS[1:]:
        columns[name] = np.concatenate([getattr(batch, name).numpy() for batch in batches])
    for name in ("step", "index"):
        columns[name] = np.array([getattr(batch, name) for batch in batches], dtype=np.int64)
    return pa.table({name: _one(values) for name, values in columns.items()})


_TENSORS = ("images", "ids", "labels", "weights")


def _one(values: NDArray[Any]) -> pa.LargeListArray:
    """One row that is the list of these values, without a copy."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values))


def _from_row(row: pa.Table) -> Iterator["MicroBatch"]:
    """The micro-batches of a row; their tensors are read-only views of it."""
    import torch

    from pipelines.windows import MicroBatch

    arrays = {name: _list_of(row[name].chunks) for name in row.column_names}
    steps, indices, shape = (arrays[name].to_pylist() for name in ("step", "index", "shape"))
    # DLPack, since from_numpy warns of memory that must not be written, as the object store's must not.
    tensors = {name: torch.from_dlpack(arrays[name]).reshape(len(steps), -1) for name in _TENSORS}
    for i, (step, index) in enumerate(zip(steps, indices)):
        yield MicroBatch(
            images=tensors["images"][i].reshape(shape),
            ids=tensors["ids"][i],
            labels=tensors["labels"][i],
            weights=tensors["weights"][i],
            step=step,
            index=index,
        )


def _list_of(chunks: list[Any]) -> Any:
    """The values of a column's only row. Joining chunks copies, even a single one."""
    return (chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)).flatten()
