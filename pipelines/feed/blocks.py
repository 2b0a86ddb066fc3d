"""Pack several micro-batches of one rank into a block, which is a table of one row, and unpack it.

A block also says which execution may start when it arrives. Torch is imported only where a block is unpacked, since it
would cost each of Ray Data's own processes two seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.feed.plan import Ids

if TYPE_CHECKING:
    from pipelines.feed.micro_batch import MicroBatch

_TENSORS = ("images", "ids", "labels", "weights")
_NUMBERS = ("step", "index")
_NEXT = "next"
"""Column with the execution that may start when the block arrives, or 0."""


@dataclass(frozen=True)
class SampleArrays:
    """A micro-batch as arrays, with the fields of `MicroBatch`."""

    images: NDArray[Any]
    ids: Ids
    labels: Ids
    weights: NDArray[np.float32]
    step: int
    index: int


def to_block(batches: Sequence[SampleArrays], images: NDArray[Any], next_execution: int) -> pa.Table:
    """Pack micro-batches end to end into the lists of one row.

    `images` is [micro-batches, crops * batch, height, width, channels], the memory that their images view.
    `next_execution` may start when the block arrives; 0 if none may.
    """
    columns = {"images": images.reshape(-1), "shape": np.array(images.shape[1:], dtype=np.int64)}
    for name in _TENSORS[1:]:
        columns[name] = np.concatenate([getattr(batch, name) for batch in batches])
    for name in _NUMBERS:
        columns[name] = np.array([getattr(batch, name) for batch in batches], dtype=np.int64)
    return pa.table({name: as_list(values) for name, values in columns.items()} | {_NEXT: [next_execution]})


def next_execution(block: pa.Table) -> int:
    """Return the execution that may start when this block has arrived, or 0."""
    return block[_NEXT][0].as_py()


def as_list(values: NDArray[Any]) -> pa.LargeListArray:
    """Return a column whose only row is the list of these values, without a copy."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values))


def from_block(block: pa.Table) -> Iterator["MicroBatch"]:
    """Yield the micro-batches of a block; their tensors are read-only views of it."""
    import torch

    from pipelines.feed.micro_batch import MicroBatch

    arrays = {name: _list_of(block[name].chunks) for name in (*_TENSORS, *_NUMBERS, "shape")}
    steps, indices, shape = (arrays[name].to_pylist() for name in (*_NUMBERS, "shape"))
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
    """Return the values of a column's only row. Joining chunks copies, even a single one."""
    return (chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)).flatten()
