"""The epoch plan: the order of samples, a pure function of seed, epoch, manifest and global batch.

1. Shuffle the row groups of the split.
2. Cut the stream of their rows into shuffle windows of whole steps.
3. Share a window out to lanes: with L lanes, lane l gets the l-th part of the window's rows, and fills the l-th part of
   each of its steps.
4. Shuffle the rows within each lane.

Neither the number of workers nor the micro-batch changes which samples make up a step. With several lanes, a rank needs
only the row groups of its own lanes. The price: rows mix only within their window, and in a micro-batch only within its
lane. Memory is proportional to the number of row groups, plus the rows of one window.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mae_core.errors import UserError
from mae_core.randomness import Purpose, hash64_numpy
from pipelines.dataset.manifest import Manifest, Shard
from pipelines.storage import Storage

Ids = NDArray[np.int64]
PLACEHOLDER = -1
"""Sample id of a slot that no sample fills; its weight is 0."""


@dataclass(frozen=True, eq=False)
class Index:
    """The row groups of one split, by ascending sample id; with `selected`, only those ids take part."""

    paths: tuple[str, ...]
    shard: NDArray[np.int32]
    group: NDArray[np.int32]
    first_id: Ids
    num_rows: NDArray[np.int32]
    selected: Ids | None = None

    @classmethod
    def from_manifest(cls, manifest: Manifest, split: str) -> "Index":
        """Index every row of a split. Raises UserError if there is no such split, or it is empty."""
        found = cls.of_shards(manifest.split(split).shards)
        if not len(found.group):
            raise UserError(f"split {split!r} has no images; choose another, or prepare a source that has some")
        return found

    @classmethod
    def of_shards(cls, shards: Sequence[Shard]) -> "Index":
        """Index every row of these shards."""
        counts = np.array([shard.num_groups for shard in shards], dtype=np.int64)
        shard = np.repeat(np.arange(len(shards)), counts)
        group = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        per_group = np.array([s.rows_per_group for s in shards], dtype=np.int64)[shard]
        rows = np.array([s.num_rows for s in shards], dtype=np.int64)[shard]
        first = np.array([s.first_id for s in shards], dtype=np.int64)[shard]
        return cls(
            paths=tuple(s.path for s in shards),
            shard=shard.astype(np.int32),
            group=group.astype(np.int32),
            first_id=first + group * per_group,
            num_rows=np.minimum(per_group, rows - group * per_group).astype(np.int32),
        )

    @property
    def num_samples(self) -> int:
        return int(self.num_rows.sum()) if self.selected is None else len(self.selected)

    def group_counts(self) -> Ids:
        """Count the rows of each row group that take part."""
        if self.selected is None:
            return self.num_rows.astype(np.int64)
        return self._bounds(self.first_id + self.num_rows) - self._bounds(self.first_id)

    def rows(self, group: int, start: int, stop: int) -> Ids:
        """Return the rows, within row group `group` of the index, of its samples [start, stop) that take part."""
        if self.selected is None:
            return np.arange(start, stop, dtype=np.int64)
        offset = int(self._bounds(self.first_id[group : group + 1])[0])
        return self.selected[offset + start : offset + stop] - self.first_id[group]

    def only(self, ids: Ids) -> "Index":
        """Restrict the index to these samples."""
        return dataclasses.replace(self, selected=np.unique(np.asarray(ids, dtype=np.int64)))

    def take_per_class(self, storage: Storage, per_class: int, *, seed: int) -> "Index":
        """Restrict the index to `per_class` samples of every class, chosen by the seed.

        Reads the label column of every shard. Raises UserError if a class has fewer.
        """
        return self.only(choose_per_class(*self._chosen_labels(storage), per_class, seed=seed))

    def take_labelled(self, storage: Storage) -> "Index":
        """Restrict the index to the samples that have a label. Reads the label column of every shard."""
        ids, labels = self.labels(storage)
        return self.only(ids[labels >= 0])

    def take_share(self, storage: Storage, share: float, *, seed: int) -> "Index":
        """Restrict the index to a share of every class, at least one sample of each, chosen by the seed.

        Reads the label column of every shard. Raises UserError if there are no labels.
        """
        return self.only(choose_share(*self._chosen_labels(storage), share, seed=seed))

    def labels(self, storage: Storage) -> tuple[Ids, Ids]:
        """Read the sample ids and labels of all rows, row group by row group; a row without a label has -1."""
        import pyarrow.parquet as pq

        labels = []
        for path in self.paths:
            column = pq.read_table(storage.open_input(path), columns=["label"])["label"]
            labels.append(column.fill_null(PLACEHOLDER).to_numpy().astype(np.int64))
        ids = np.concatenate([first + np.arange(rows) for first, rows in zip(self.first_id, self.num_rows)])
        return ids, np.concatenate(labels)

    def _chosen_labels(self, storage: Storage) -> tuple[Ids, Ids]:
        """Read the sample ids and labels of the rows that take part."""
        ids, labels = self.labels(storage)
        if self.selected is None:
            return ids, labels
        chosen = np.isin(ids, self.selected)
        return ids[chosen], labels[chosen]

    def _bounds(self, ids: Ids) -> Ids:
        assert self.selected is not None
        return np.searchsorted(self.selected, ids).astype(np.int64)


def choose_per_class(ids: Ids, labels: Ids, per_class: int, *, seed: int) -> Ids:
    """Choose the `per_class` ids of every label with the smallest hash. Raises UserError if there are fewer."""
    ids, counts = _by_label(ids, labels, seed)
    if counts.min() < per_class:
        raise UserError(
            f"labels_per_class {per_class} exceeds the {counts.min()} images of the smallest class; try {counts.min()}"
        )
    return _first_of_each(ids, counts, np.full_like(counts, per_class))


def choose_share(ids: Ids, labels: Ids, share: float, *, seed: int) -> Ids:
    """Choose the rounded share of every label's ids, at least one, with the smallest hash."""
    ids, counts = _by_label(ids, labels, seed)
    return _first_of_each(ids, counts, np.maximum(1, np.rint(share * counts).astype(np.int64)))


def _by_label(ids: Ids, labels: Ids, seed: int) -> tuple[Ids, Ids]:
    """Return the ids by label and then by hash, and the number of ids of each label that occurs."""
    if (labels < 0).any():
        raise UserError(
            "a labelled subset needs a labelled dataset, and images have no label; prepare it with --labels, or use all"
        )
    order = np.lexsort((hash64_numpy(seed, Purpose.SUBSET, ids), labels))
    return ids[order], np.unique(labels, return_counts=True)[1]


def _first_of_each(ids: Ids, counts: Ids, wanted: Ids) -> Ids:
    """Return the first `wanted` of each run of `counts` ids, ascending."""
    starts = np.cumsum(counts) - counts
    return np.sort(np.concatenate([ids[start : start + count] for start, count in zip(starts, wanted)]))


@dataclass(frozen=True, eq=False)
class GroupRead:
    """Rows of one row group that a window needs, and the slots of the window that they fill."""

    path: str
    group: int
    rows: Ids
    slots: Ids


@dataclass(frozen=True, eq=False, kw_only=True)
class EpochPlan:
    """The order of one split, epoch after epoch. Steps count over all epochs; a slot is a position in a window."""

    index: Index
    seed: int
    batch: int
    micro_batch: int
    num_workers: int
    window: int
    shuffle: bool = True
    lanes: int = 1
    """Equal parts of a step, each of samples from row groups of its own."""
    is_listed: bool = False
    """Take the row groups in the order in which they are stored, as while they are still being prepared."""

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.batch % self.lanes:
            raise UserError(f"batch {self.batch} is not a multiple of lanes {self.lanes}; try 1")
        if self.micro_batch < 1 or self.batch % self.micro_batch:
            raise UserError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; try {self.batch}")
        if self.num_workers < 1:
            raise UserError(f"num_workers {self.num_workers} is below 1; try 1")

    @property
    def num_samples(self) -> int:
        return self.index.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all ranks, filled up with placeholders to a multiple of the number of workers."""
        return -(-(self.batch // self.micro_batch) // self.num_workers) * self.num_workers

    @property
    def steps_per_window(self) -> int:
        """Steps of a window: its samples are the multiple of the batch nearest to `window`, and at least one."""
        return max(1, (2 * self.window + self.batch) // (2 * self.batch))

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.steps_per_epoch // self.steps_per_window)

    def planned(self, step: int) -> int:
        """Count the real samples of a step, without placeholders."""
        return min(self.batch, self.num_samples - step % self.steps_per_epoch * self.batch)

    def window_steps(self, epoch: int, window: int) -> range:
        """Return the steps of a window."""
        first = epoch * self.steps_per_epoch
        stop = min(self.steps_per_epoch, (window + 1) * self.steps_per_window)
        return range(first + window * self.steps_per_window, first + stop)

    def window_ids(self, epoch: int, window: int) -> Ids:
        """Return the sample id of every slot of a window, in training order, without placeholders."""
        return self._window(epoch, window)[0]

    def window_reads(self, epoch: int, window: int, slots: Ids) -> list[GroupRead]:
        """List what to read for the given slots of a window, each row group once."""
        ids, groups = (array[slots] for array in self._window(epoch, window))
        order = np.argsort(groups, kind="stable")
        found, starts = np.unique(groups[order], return_index=True)
        return [
            GroupRead(
                path=self.index.paths[self.index.shard[group]],
                group=int(self.index.group[group]),
                rows=ids[wanted] - self.index.first_id[group],
                slots=slots[wanted],
            )
            for group, wanted in zip(found.tolist(), np.split(order, starts[1:]))
        ]

    def micro_batch_slots(self, step: int) -> list[range]:
        """Return the slots of each micro-batch of a step; micro-batch j goes to rank j % num_workers.

        One with fewer slots than `micro_batch` is filled up with placeholders.
        """
        first = step % self.steps_per_epoch % self.steps_per_window * self.batch
        stop = first + self.planned(step)
        starts = range(first, first + self.micro_batches_per_step * self.micro_batch, self.micro_batch)
        return [range(min(start, stop), min(start + self.micro_batch, stop)) for start in starts]

    def step_ids(self, step: int, rank: int | None = None) -> Ids:
        """Return the sample ids of a step with placeholders: of one rank, or of all ranks in micro-batch order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        ids = self.window_ids(epoch, within // self.steps_per_window)
        mine = self.micro_batch_slots(step)[rank :: self.num_workers if rank is not None else 1]
        found = np.full((len(mine), self.micro_batch), PLACEHOLDER, dtype=np.int64)
        for row, slots in zip(found, mine):
            row[: len(slots)] = ids[slots.start : slots.stop]
        return found.ravel()

    @lru_cache(maxsize=4)  # noqa: B019 -- plans compare by identity and a process holds few
    def _order(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the row groups in epoch order, and where each starts in the stream of samples."""
        order = np.arange(len(self.index.group))
        if self.shuffle and not self.is_listed:
            order = np.argsort(hash64_numpy(self.seed, Purpose.ROW_GROUPS, epoch, self.index.first_id), kind="stable")
        counts = self.index.group_counts()[order]
        return order, np.cumsum(counts) - counts

    @lru_cache(maxsize=4)  # noqa: B019
    def _window(self, epoch: int, window: int) -> tuple[Ids, Ids]:
        """Return the sample id and the row group, as its number in the index, of every slot."""
        assert 0 <= window < self.windows_per_epoch
        order, starts = self._order(epoch)
        first = window * self.steps_per_window * self.batch
        stop = min(self.num_samples, first + self.steps_per_window * self.batch)
        ids, groups = [], []
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        for place in range(begin, int(np.searchsorted(starts, stop))):
            group, start = int(order[place]), int(starts[place])
            size = (int(starts[place + 1]) if place + 1 < len(starts) else self.num_samples) - start
            rows = self.index.rows(group, max(first - start, 0), min(stop - start, size))
            ids.append(rows + self.index.first_id[group])
            groups.append(np.full(len(rows), group, dtype=np.int64))
        all_ids, all_groups = np.concatenate(ids), np.concatenate(groups)
        lanes = np.arange(len(all_ids)) % self.batch // (self.batch // self.lanes)
        slots = np.argsort(lanes, kind="stable")  # by lane, as the rows of the window are shared out
        order = np.arange(len(all_ids))
        if self.shuffle:
            order = np.lexsort((hash64_numpy(self.seed, Purpose.ROWS, epoch, all_ids), lanes[slots]))
        found = np.empty_like(all_ids), np.empty_like(all_groups)
        found[0][slots], found[1][slots] = all_ids[order], all_groups[order]
        return found
