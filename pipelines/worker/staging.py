"""Copy the next micro-batches to the GPU while the present step computes.

1. A thread takes micro-batches from the feed, copies each to pinned memory, and from there to the device, on a stream
   of its own. At most `DEPTH` wait there.
2. The training thread lets its stream wait for the copy, which blocks the device if at all, never the host.

On the CPU nothing is copied, and the feed's own thread reads ahead.
"""

import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import TypeVar

import torch

from pipelines.feed.micro_batch import MicroBatch

DEPTH = 2
"""Micro-batches on the device beside those of the present step."""

T = TypeVar("T")
S = TypeVar("S")


def staged(batches: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Yield the micro-batches on the device; on a GPU, `DEPTH` of them are copied ahead."""
    if device.type != "cuda":
        return batches
    return _received(ahead(batches, _Upload(device), DEPTH), device)


def ahead(items: Iterator[T], prepare: Callable[[T], S], depth: int) -> Iterator[S]:
    """Yield `prepare(item)` for every item, in order; a thread, which starts at once, prepares `depth` of them ahead.

    An error of `items` or `prepare` is raised in its place.
    """
    # While one item is waiting to be put, the thread holds it beside those in the queue.
    ready: Queue[tuple[S | None, BaseException | None]] = Queue(maxsize=max(1, depth - 1))

    def work() -> None:
        try:
            for item in items:
                ready.put((prepare(item), None))
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=work, name="ahead", daemon=True).start()
    return _taken(ready)


def _taken(ready: "Queue[tuple[S | None, BaseException | None]]") -> Iterator[S]:
    while True:
        item, error = ready.get()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        assert item is not None
        yield item


class _Upload:
    """Copies to a GPU on a stream of its own; called on one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event]:
        """Begin the copy; return it with the event of its end."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # The allocator keeps pinned memory until the copies from it have ended.
            found = batch.pinned().to(self._device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return found, copied


def _received(copies: Iterator[tuple[MicroBatch, torch.cuda.Event]], device: torch.device) -> Iterator[MicroBatch]:
    for batch, copied in copies:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        # The memory was allocated on the other stream, and must not be reused there before this one has read it.
        for tensor in batch.tensors:
            tensor.record_stream(stream)
        yield batch
