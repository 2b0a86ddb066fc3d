"""Micro-batches are prepared ahead, in order and in a bounded number, and a step makes the host wait for nothing."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.feed.micro_batch import MicroBatch
from pipelines.worker.loop import train
from pipelines.worker.meter import Meter
from pipelines.worker.rank import Feed
from pipelines.worker.staging import ahead, staged
from tests.pipelines.worker.test_loop import batches_of, loss_of, plan_of, rank_of, state_of
from tests.waiting import wait_until

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run it on a machine with a GPU")


def test_items_come_in_order_and_only_so_many_are_prepared_ahead() -> None:
    prepared: list[int] = []

    def prepare(item: int) -> int:
        prepared.append(item)
        return -item

    found = ahead(iter(range(10)), prepare, 3)
    wait_until(lambda: len(prepared) == 3, "three items were prepared")
    assert next(found) == 0
    wait_until(lambda: len(prepared) == 4, "a fourth item was prepared")
    assert list(found) == [-item for item in range(1, 10)]
    assert list(found) == []


def test_an_error_of_the_feed_is_raised_after_what_came_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the store is down")

    found = ahead(failing(), str, 2)
    assert next(found) == "1"
    with pytest.raises(OSError, match="the store is down"):
        next(found)


def test_an_item_that_cannot_be_prepared_is_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead(iter([1, 0]), lambda item: 1 // item, 2))


def test_on_the_cpu_nothing_is_copied_and_no_thread_is_started() -> None:
    batches = iter([MicroBatch.blank(2, (8, 8), 3)])
    before = threading.active_count()
    assert staged(batches, CPU) is batches
    assert threading.active_count() == before


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_copies_equal_the_feed() -> None:
    device, plan, rank = torch.device("cuda"), plan_of(1), rank_of(0, 1)
    batches = [batch for step in range(6) for batch in batches_of(plan, step, rank)]
    for batch, found in zip(batches, staged(iter(batches), device), strict=True):
        assert (found.step, found.index) == (batch.step, batch.index)
        assert all(tensor.device.type == "cuda" for tensor in found.tensors)
        for ours, theirs in zip(found.tensors, batch.tensors, strict=True):
            assert torch.equal(ours.cpu(), theirs)


class Reads(TorchDispatchMode):
    """Counts operations for which a GPU's host would have to wait: reading a value, or a shape that depends on one."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.waiting:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def steps(reads: Reads, device: torch.device) -> Meter:
    """Train for four steps with a meter that is not read; count what the host waits for."""
    plan, rank = plan_of(1), dataclasses.replace(rank_of(0, 1), device=device)
    state, meter = state_of(rank), Meter(rank)
    feed = Feed(staged((batch for step in range(4) for batch in batches_of(plan, step, rank)), device))

    def after(step: int, loss: Any, bad: Any) -> None:
        meter.add(step, loss, bad, 16)

    with reads:
        train(state, rank, plan, feed, 4, loss_of, after)
    return meter


def test_the_host_waits_for_nothing_within_a_step() -> None:
    reads = Reads()
    meter = steps(reads, CPU)
    # AdamW reads the count of its steps, which is on the host unless it is fused.
    assert reads.found == []
    with reads:
        assert meter.bad_steps() == []
        meter.drain()
    assert reads.found, "reading the meter is what waits"


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_no_call_of_a_step_synchronizes() -> None:
    device = torch.device("cuda")
    steps(Reads(), device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(Reads(), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
