"""Samples of one forward pass as tensors, which ranks train on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mae_core.config import Size
from pipelines.feed.blocks import SampleArrays
from pipelines.feed.plan import PLACEHOLDER
from pipelines.feed.segments import FeedSegment
from pipelines.feed.windows import Window


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass on one rank. A placeholder has id -1, weight 0 and black pixels.

    A sample that could not be decoded keeps its id and label, with weight 0. Without labels they are -1.
    """

    images: Tensor
    """uint8 [crops * batch, height, width, channels], or float32 from 0 to 1 for other values than plain pixels; rows
    run over the samples, then over their crops."""
    ids: Tensor
    """int64 [batch]"""
    labels: Tensor
    """int64 [batch]"""
    weights: Tensor
    """float32 [batch]"""
    step: int
    """Step of its segment's plan."""
    index: int
    """Number among the step's micro-batches of all ranks."""

    @classmethod
    def blank(cls, size: int, image_px: Size, channels: int, crops: int = 1, *, in_float: bool = False) -> "MicroBatch":
        """Make a micro-batch of placeholders."""
        dtype = torch.float32 if in_float else torch.uint8
        return cls(
            images=torch.zeros(crops * size, *image_px, channels, dtype=dtype),
            ids=torch.full((size,), PLACEHOLDER, dtype=torch.int64),
            labels=torch.full((size,), -1, dtype=torch.int64),
            weights=torch.zeros(size),
            step=0,
            index=0,
        )

    @classmethod
    def of(cls, arrays: SampleArrays) -> "MicroBatch":
        """Make a micro-batch whose tensors share the memory of the arrays."""
        return cls(
            images=torch.from_numpy(arrays.images),
            ids=torch.from_numpy(arrays.ids),
            labels=torch.from_numpy(arrays.labels),
            weights=torch.from_numpy(arrays.weights),
            step=arrays.step,
            index=arrays.index,
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, ids, labels and weights."""
        return self.images, self.ids, self.labels, self.weights

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Copy to a device; the copy does not block if the tensors are in pinned memory."""
        return self._with(tensor.to(device, non_blocking=True) for tensor in self.tensors)

    def pinned(self) -> "MicroBatch":
        """Copy to memory from which a GPU can copy without holding up the host."""
        return self._with(tensor.pin_memory() for tensor in self.tensors)

    def _with(self, tensors: Iterable[Tensor]) -> "MicroBatch":
        images, ids, labels, weights = tensors
        return MicroBatch(images, ids, labels, weights, step=self.step, index=self.index)


def window_micro_batches(segment: FeedSegment, window: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all ranks of one window, counted over all epochs of the segment."""
    opened = Window(segment, window)
    return (MicroBatch.of(opened.micro_batch(number)) for number in range(len(opened)))
