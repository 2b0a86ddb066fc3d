"""The listed epoch: a first epoch whose samples are still being prepared, in the order in which they are stored.

1. The driver announces every shard of the training split, in the order of the manifest to be, once it is final.
2. A shuffle window is the next whole number of steps of the rows of all shards in this order, shuffled as any window.
   So it depends neither on when shards are announced nor on where they end, and its sample ids are those of the
   manifest.
3. Ranks wait until the shards of a window are announced. Data tasks never do: an execution has the windows that are
   ready when it begins.
4. The number of steps is known once all shards are announced.

Imports no torch, since Ray's own processes import this module.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from pipelines.dataset.manifest import Shard
from pipelines.feed.channel import FeedChannel
from pipelines.feed.executions import Executions
from pipelines.feed.plan import EpochPlan, Ids, Index
from pipelines.feed.segments import FeedSegment
from pipelines.shared_table import SharedTable

_POLL_EVERY_S = 0.2
NOTHING = Index(
    paths=(),
    shard=np.zeros(0, np.int32),
    group=np.zeros(0, np.int32),
    first_id=np.zeros(0, np.int64),
    num_rows=np.zeros(0, np.int32),
)
"""Index before the first shard is announced."""


@dataclass(frozen=True)
class Announcements:
    """The final shards of a training split that is being prepared, in the shared table of the cluster."""

    key: str
    """Names the preparation among all of the cluster."""
    rows_per_group: int

    def add(self, number: int, path: str, num_rows: int) -> None:
        """Announce shard `number`, counted from 0 in the order of the manifest."""
        self._table.put(str(number), f"{num_rows} {path}")

    def complete(self, num_shards: int) -> None:
        """Announce that there are no more shards than these."""
        self._table.put("count", num_shards)

    def shard(self, number: int, first_id: int) -> Shard | None:
        """Return a shard, whose first sample has this id; None until it is announced."""
        num_rows, _, path = self._table.get(str(number), "").partition(" ")
        if not path:
            return None
        rows = {"num_rows": int(num_rows), "first_id": first_id, "rows_per_group": self.rows_per_group}
        return Shard(path=path, num_bytes=0, sha256="", **rows)

    def count(self) -> int | None:
        """Return the number of all shards; None until the last one is announced."""
        found = self._table.get("count", -1)
        return None if found < 0 else found

    @property
    def _table(self) -> SharedTable:
        return SharedTable("mae-listing", self.key)


class ListedShards:
    """The shards that this process knows to be announced."""

    def __init__(self, announcements: Announcements) -> None:
        self._announcements = announcements
        self._shards: list[Shard] = []
        self._index: Index | None = None
        self._lock = threading.Lock()
        self.num_samples = 0
        self.is_complete = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ListedShards, (self._announcements,)

    def refresh(self) -> None:
        """Learn of the shards that were announced meanwhile; any thread may call it."""
        with self._lock:
            count = self._announcements.count()
            while found := self._announcements.shard(len(self._shards), self.num_samples):
                self._shards.append(found)
                self.num_samples += found.num_rows
            self.is_complete = len(self._shards) == count

    @property
    def index(self) -> Index:
        """Index of the shards that are known."""
        with self._lock:
            if self._index is None or len(self._index.paths) != len(self._shards):
                self._index = Index.of_shards(self._shards)
            return self._index


@dataclass(frozen=True, kw_only=True)
class ListedWindows:
    """The windows of a listed epoch from `first_step` on, and which of them are ready."""

    announcements: Announcements
    batch: int
    steps_per_window: int
    first_step: int

    @cached_property
    def shards(self) -> ListedShards:
        """What this process knows."""
        return ListedShards(self.announcements)

    @property
    def first(self) -> int:
        """The window of the first step."""
        return self.first_step // self.steps_per_window

    def num_ready(self) -> tuple[int, bool]:
        """Return how many windows are ready, and whether these are all."""
        self.shards.refresh()
        if not self.shards.is_complete:
            return max(0, self._steps_ready() // self.steps_per_window - self.first), False
        num_steps = -(-self.shards.num_samples // self.batch)
        left = num_steps > self.first_step
        return (-(-num_steps // self.steps_per_window) - self.first if left else 0), True

    def _steps_ready(self) -> int:
        return self.shards.num_samples // self.batch


@dataclass(frozen=True, kw_only=True)
class ListedSegment(FeedSegment):
    """The steps of a listed epoch from `first_step` on; `last_step` is the most that it may have.

    `plan` has an index without rows, in whose place comes that of the shards known when a window is opened.
    """

    announcements: Announcements

    @cached_property
    def windows(self) -> ListedWindows:
        """The windows of the segment."""
        return ListedWindows(
            announcements=self.announcements,
            batch=self.plan.batch,
            steps_per_window=self.plan.steps_per_window,
            first_step=self.first_step,
        )

    def plan_of(self, window: int) -> EpochPlan:
        """Return a plan in which this window, which is ready, is as in that of the whole epoch."""
        shards = self.windows.shards
        if not shards.is_complete and shards.num_samples < (window + 1) * self.plan.steps_per_window * self.plan.batch:
            shards.refresh()
        return dataclasses.replace(self.plan, index=shards.index)

    def _window_of(self, step: int) -> int:
        return step // self.plan.steps_per_window


@dataclass(frozen=True)
class ListedExecutions:
    """Executions of the windows that are ready when each begins, as the first rank of a node to begin it finds."""

    most: Executions
    """Size and number of executions if all windows were ready."""
    channel: FeedChannel
    windows: ListedWindows

    def begin(self, execution: int) -> bool:
        """Wait until a window of the execution is ready; return False if there is none any more."""
        start = self._start(execution)
        while self.channel.stop_of(execution) is None:
            num_ready, are_all = self.windows.num_ready()
            if num_ready > start:
                self.channel.stop(execution, min(num_ready, start + self.most.size))
            elif are_all:
                return False
            else:
                time.sleep(_POLL_EVERY_S)
        return True

    @property
    def count(self) -> int:
        """Number of executions that there may be at most."""
        return self.most.num_tasks

    def tasks(self, execution: int) -> range:
        """Return task ids of an execution; of one that has not begun, as Ray Data may plan it, those of one window."""
        start = self._start(execution)
        stop = self.channel.stop_of(execution)
        return range(start, start + 1 if stop is None else stop)

    def next_after(self, task: int) -> int:
        """Return the execution that may start once a block of this task has arrived; 0 if none."""
        execution = self.of_task(task)
        stop = self.channel.stop_of(execution)
        assert stop is not None, "its tasks run"
        return execution + 1 if stop - self.most.max_running <= task else 0

    def is_last(self, task: int) -> bool:
        """Return whether the task is the last one of its execution."""
        return self.channel.stop_of(self.of_task(task)) == task + 1

    def of_task(self, task: int) -> int:
        """Return the execution of a task."""
        execution = 0
        while (stop := self.channel.stop_of(execution)) is not None and stop <= task:
            execution += 1
        return execution

    def _start(self, execution: int) -> int:
        return (self.channel.stop_of(execution - 1) or 0) if execution else 0


AnyExecutions: TypeAlias = Executions | ListedExecutions


class ListedPlan:
    """What a rank knows of the plan of a listed epoch, as far as it has waited for it."""

    def __init__(self, plan: EpochPlan, windows: ListedWindows, num_expected: int) -> None:
        """`plan` has an index without rows; `num_expected` is the number of samples to expect of the whole epoch."""
        self._plan, self._windows = plan, windows
        self.steps_per_epoch = -(-num_expected // plan.batch)
        """Steps of an epoch of the samples to expect."""

    def await_step(self, step: int, is_held: Callable[[], bool]) -> bool:
        """Wait until the samples of a step are ready; return False if the epoch has ended before it.

        Returns True also as soon as the rank is held, whose group then decides whether to do the step.
        """
        shards, window = self._windows.shards, step // self._plan.steps_per_window
        needed = (window + 1) * self._plan.steps_per_window * self._plan.batch
        while not shards.is_complete and shards.num_samples < needed:
            if is_held():
                return True
            shards.refresh()
            if not shards.is_complete and shards.num_samples < needed:
                time.sleep(_POLL_EVERY_S)
        return not shards.is_complete or step * self._plan.batch < shards.num_samples

    @property
    def micro_batches_per_step(self) -> int:
        return self._plan.micro_batches_per_step

    def planned(self, step: int) -> int:
        """Count the real samples of a step that is ready."""
        return self._known.planned(step)

    def step_ids(self, step: int, rank: int | None = None) -> Ids:
        """Return the sample ids of a step that is ready, as `EpochPlan.step_ids` does."""
        return self._known.step_ids(step, rank)

    @property
    def _known(self) -> EpochPlan:
        return dataclasses.replace(self._plan, index=self._windows.shards.index)


StepPlan: TypeAlias = EpochPlan | ListedPlan
"""What training asks of a plan."""


def announce_all(announcements: Announcements, shards: Sequence[Shard]) -> None:
    """Announce all shards of a split that is prepared."""
    for number, shard in enumerate(shards):
        announcements.add(number, shard.path, shard.num_rows)
    announcements.complete(len(shards))
