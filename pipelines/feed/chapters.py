"""A feed runs chapter by chapter: so many of its windows are one execution of Ray Data.

Ray Data makes all tasks of an execution before the first of them runs (1.5 ms each), and keeps 3 kB of every row that
it has handed out until the execution ends: 800 epochs of ImageNet would begin after three minutes, and their
coordinator would need 9 GB in the end. Two datasets take turns, so that the next chapter's tasks start while the last
windows of this one are still on their way. What processes must know of each other lies in the cluster's own table.
"""

from dataclasses import dataclass
from typing import TypeVar

NUM_TURNS = 2
"""Datasets that take turns."""

_LEAST_TASKS, _TIMES = 128, 8
_NAMESPACE = b"mae-feed"


@dataclass(frozen=True)
class Chapters:
    """Tasks from 0 to num_tasks - 1, in chapters of `size`."""

    key: str
    """Names the feed among all of the cluster."""
    num_tasks: int
    size: int
    at_a_time: int

    @classmethod
    def of(cls, key: str, num_tasks: int, at_a_time: int) -> "Chapters":
        """Chapters of many times the tasks that run at a time."""
        return cls(key, num_tasks, max(_LEAST_TASKS, _TIMES * at_a_time), at_a_time)

    def tasks(self, chapter: int) -> range:
        """Those of a chapter, none behind the last."""
        return range(chapter * self.size, min((chapter + 1) * self.size, self.num_tasks))

    def next_after(self, task: int) -> int:
        """The chapter that may be begun once there is a row of that task: the next one in a chapter's last tasks, which
        may all run at a time; 0 for none, which is never next."""
        stop = (task // self.size + 1) * self.size
        return task // self.size + 1 if stop - self.at_a_time <= task and stop < self.num_tasks else 0

    def started(self, task: int) -> None:
        """Said by every task when it starts, for `is_under_way`."""
        if (task + 1) % self.size == 0:
            _put(self.key, "under way", task // self.size)


def dataset_name(turn: int) -> str:
    """What Ray Train calls the dataset of a turn."""
    return f"feed-{turn}"


def begin(key: str, chapter: int) -> None:
    """The dataset whose turn it is will be that chapter when it is next executed.

    Every rank says so before it asks for the first row, and an execution starts when all have asked. One rank cannot
    be a turn ahead of another: it would have rows of a chapter that the other has not asked for.
    """
    _put(key, str(chapter % NUM_TURNS), chapter)


def begun(key: str, turn: int) -> int:
    """The chapter that the dataset of that turn is to be."""
    return _get(key, str(turn), turn)


def is_under_way(key: str, chapter: int) -> bool:
    """No task of the chapter still waits for a CPU.

    Before that the next one must not begin: its tasks could take all CPUs, fill the object store with rows that no one
    takes yet, and hold these CPUs for ever.
    """
    return _get(key, "under way", -1) >= chapter


def announce(run: str, key: str) -> None:
    """From now on that feed is the run's: each worker group has one of its own."""
    _put(run, "feed", key)


def announced(run: str) -> str:
    """The key of the feed that was announced last; empty where none was."""
    return _get(run, "feed", "")


T = TypeVar("T", int, str)


def _put(key: str, name: str, value: int | str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{key}/{name}".encode(), str(value).encode(), overwrite=True, namespace=_NAMESPACE)


def _get(key: str, name: str, default: T) -> T:
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(f"{key}/{name}".encode(), namespace=_NAMESPACE)
    return default if found is None else type(default)(found.decode())
