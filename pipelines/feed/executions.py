"""How the tasks of a feed are grouped into executions of Ray Data, of at least 128 tasks each.

Ray Data creates all tasks of an execution before the first one runs (1.5 ms each), and keeps 3 kB for every block that
it has handed out until the execution ends: in one execution, 800 epochs of ImageNet would start after three minutes and
need 9 GB in the end. So a feed runs in many executions, and two datasets alternate: tasks of the next execution start
while the last windows of this one are still on their way. `channel` says how the processes agree on when.
"""

from dataclasses import dataclass

NUM_DATASETS = 2
"""Datasets of a feed: execution i belongs to dataset i % NUM_DATASETS."""

_MIN_TASKS, _MIN_ROUNDS = 128, 8


@dataclass(frozen=True)
class Executions:
    """Tasks 0 to num_tasks - 1, one per shuffle window, in executions of `size` tasks."""

    num_tasks: int
    size: int
    max_running: int
    """Tasks that run at a time."""

    @classmethod
    def of(cls, num_tasks: int, max_running: int) -> "Executions":
        """Make executions of eight times as many tasks as run at a time, and at least 128."""
        return cls(num_tasks, max(_MIN_TASKS, _MIN_ROUNDS * max_running), max_running)

    def begin(self, execution: int) -> bool:
        """Return whether there is such an execution; all of them may begin at once."""
        return execution < self.count

    @property
    def count(self) -> int:
        """Number of executions."""
        return -(-self.num_tasks // self.size)

    def tasks(self, execution: int) -> range:
        """Task ids of an execution; empty past the last one."""
        return range(execution * self.size, min((execution + 1) * self.size, self.num_tasks))

    def next_after(self, task: int) -> int:
        """Return the execution that may start once a block of this task has arrived; 0 if none, since 0 follows none.

        It is the next one if the task is among the last of its execution, which may all be running at that time.
        """
        stop = (task // self.size + 1) * self.size
        return task // self.size + 1 if stop - self.max_running <= task and stop < self.num_tasks else 0

    def is_last(self, task: int) -> bool:
        """Return whether the task is the last one of a full execution."""
        return (task + 1) % self.size == 0

    def of_task(self, task: int) -> int:
        """Return the execution of a task."""
        return task // self.size
