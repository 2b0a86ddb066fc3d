"""An execution of Ray Data whose consumer is slow rests, and loses no block by it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.ray_data import RestWhileNothingChanges, configure
from tests.waiting import let_pass

NUM_BLOCKS, BLOCK_BYTES = 40, 4 * 2**20


def numbered_blocks(rows: Any) -> Iterator[Any]:
    for number in rows["id"]:
        yield {"number": np.array([number]), "pixels": np.zeros((1, BLOCK_BYTES), np.uint8)}


@pytest.mark.slow
def test_an_execution_rests_while_nobody_takes_its_blocks(ray4: None) -> None:
    import ray.data

    num_steps = 0

    class CountSteps(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            nonlocal num_steps
            num_steps += 1

    dataset = ray.data.range(NUM_BLOCKS, override_num_blocks=1).map_batches(numbered_blocks, batch_size=None)
    configure(dataset)
    assert dataset.context.custom_execution_callback_classes == [RestWhileNothingChanges]
    dataset.context.custom_execution_callback_classes = [RestWhileNothingChanges, CountSteps]
    dataset.context.target_max_block_size = 1
    dataset.context.execution_options.preserve_order = True
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=4 * BLOCK_BYTES)
    batches = iter(dataset.iter_batches(batch_size=1))
    found = [next(batches)["number"].item()]
    let_pass(1)
    before, waited_s = num_steps, 3.0
    let_pass(waited_s)
    # A step for every rest of 50 ms, and a few shorter ones where something changed. Without rest there are thousands.
    assert num_steps - before < 2 * waited_s / 0.05
    found += [batch["number"].item() for batch in batches]
    assert found == list(range(NUM_BLOCKS))
