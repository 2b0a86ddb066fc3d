"""Memory of rows is used again, and never while anything views it."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.feed.blocks import as_list
from pipelines.feed.buffers import BlockBuffers


def address(pixels: np.ndarray) -> int:
    return pixels.__array_interface__["data"][0]


def test_memory_that_is_gone_is_used_again() -> None:
    memory = BlockBuffers()
    pixels = memory.take((3, 4, 5))
    assert pixels.shape == (3, 4, 5)
    assert pixels.flags.writeable
    before = address(pixels)
    del pixels
    assert address(memory.take((2, 5))) == before


@pytest.mark.parametrize("view", [lambda p: p[1:], lambda p: p.reshape(-1)[7:], lambda p: p.view(np.int8).T])
def test_memory_in_view_is_left_alone(view: object) -> None:
    memory = BlockBuffers()
    pixels = memory.take((4, 8))
    pixels[:] = 7
    kept = view(pixels)  # type: ignore[operator]
    del pixels
    memory.take((4, 8))[:] = 9
    memory.take((4, 8))[:] = 9
    assert (kept == 7).all()


def test_memory_of_a_table_is_left_alone_until_the_table_is_gone() -> None:
    memory = BlockBuffers()
    pixels = memory.take((4, 8))
    pixels[:] = 7
    before = address(pixels)
    table = pa.table({"images": as_list(pixels.reshape(-1))})
    part = table.slice(0, 1)
    del pixels, table
    other = memory.take((4, 8))
    other[:] = 9
    assert part["images"][0].as_py() == [7] * 32
    del part
    assert before in (address(memory.take((4, 8))), address(memory.take((4, 8))))


def test_no_more_than_two_rows_are_kept_and_small_memory_serves_no_large_row() -> None:
    memory = BlockBuffers()
    rows = [memory.take((10,)) for _ in range(5)]
    del rows
    assert len(memory._free) == 2
    large = memory.take((1000,))
    large[:] = 1
    assert large.sum() == 1000
