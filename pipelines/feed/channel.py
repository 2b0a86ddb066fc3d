"""State that the processes of a feed share, in Ray's internal key-value store. Each node has a feed and a channel.

    ranks of a node                      data tasks
      |                                      |
      | feed(): two datasets, by the first   |
      | split(): their iterators, to all     |
      |                                      |
      | channel.select(0)                    |
      | iterate dataset 0 ------------------>| task_ids reads channel.selected(0)
      |                                      | tasks 0 .. size - 1 run
      |<----------- blocks of execution 0 ---|
      |                                      | last task: channel.report_all_started(0)
      |<-- a block of one of the last tasks: "execution 1 may start"
      | channel.all_started(0)?              |
      | channel.select(1)                    |
      | iterate dataset 1 ------------------>| task_ids reads channel.selected(1)
      |<-- rest of execution 0, then 1 ------|
      | ... datasets 0 and 1 in turn         |

Two rules keep it safe.

- Every rank selects an execution before it asks for the first block, and Ray Data starts the execution when all ranks
  have asked. No rank can be an execution ahead, because it would need blocks that the others have not asked for.
- The next execution starts only after every task of the current one has started. Before that, its tasks could take all
  CPUs, fill the object store with blocks that no rank takes yet, and hold these CPUs forever.
"""

from dataclasses import dataclass

from pipelines.feed.executions import NUM_DATASETS
from pipelines.shared_table import SharedTable


@dataclass(frozen=True)
class FeedChannel:
    """The state that the ranks and the data tasks of one feed share."""

    key: str
    """Names the feed among all of the cluster."""

    def select(self, execution: int) -> None:
        """Make `execution` the one that its dataset runs when it is next iterated."""
        _table(self.key).put(str(execution % NUM_DATASETS), execution)

    def selected(self, dataset: int) -> int:
        """Return the execution that a dataset is to run: at first, the one of its own number."""
        return _table(self.key).get(str(dataset), dataset)

    def report_all_started(self, execution: int) -> None:
        """Record that the last task of an execution has started."""
        _table(self.key).put("all started", execution)

    def all_started(self, execution: int) -> bool:
        """Return whether every task of the execution has started."""
        return _table(self.key).get("all started", -1) >= execution

    def stop(self, execution: int, stop: int) -> int:
        """Decide the id after the last task of an execution, unless another rank has; return what is decided."""
        _table(self.key).put_first(f"stop {execution}", stop)
        return _table(self.key).get(f"stop {execution}", stop)

    def stop_of(self, execution: int) -> int | None:
        """Return the id after the last task of an execution; None until it is decided."""
        found = _table(self.key).get(f"stop {execution}", -1)
        return None if found < 0 else found


def _table(key: str) -> SharedTable:
    return SharedTable("mae-feed", key)
