"""A Ray Data source of task ids, with one read task per id, as small as possible.

ray.data.range pickles three nested functions with every task, which costs the driver 1.7 ms each; these cost 0.6 ms.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.feed.channel import FeedChannel
from pipelines.feed.listing import AnyExecutions
from pipelines.interrupts import die_of_sigterm


@dataclass(frozen=True)
class _ReadId:
    """Read function of one block, whose only row holds the id in column `id`."""

    id: int

    def __call__(self) -> Iterable[pa.Table]:
        return [pa.table({"id": [self.id]})]


class TaskIds(Datasource):
    """Task ids of an execution, one block each; the execution is looked up each time the dataset is executed."""

    def __init__(self, executions: AnyExecutions, channel: FeedChannel, dataset: int) -> None:
        super().__init__()
        self._executions, self._channel, self._dataset = executions, channel, dataset
        self._built_in = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the coordinator, which Ray ends by SIGTERM, perhaps before it is asked for anything."""
        self.__dict__.update(state)
        if os.getpid() != self._built_in:
            die_of_sigterm()
            # An execution may have fewer windows than tasks may run, of which Ray Data warns on the terminal.
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")

    def estimate_inmemory_data_size(self) -> None:
        """Return no estimate, so that Ray splits nothing."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task per id, whatever the parallelism."""
        metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
        ids = self._executions.tasks(self._channel.selected(self._dataset))
        reads: list[Callable[[], Iterable[pa.Table]]] = [_ReadId(id) for id in ids]
        return [ReadTask(read, metadata) for read in reads]
