"""Laws of the epoch plan over random datasets, batches, windows and workers."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.manifest import Manifest, Shard, Split
from pipelines.feed.plan import PLACEHOLDER, EpochPlan, Index, choose_per_class, choose_share

SETTINGS = settings(max_examples=60, deadline=None)


def manifest_of(shard_rows: list[int], rows_per_group: int) -> Manifest:
    shards, first_id = [], 0
    for i, rows in enumerate(shard_rows):
        shards.append(
            Shard(
                path=f"train/part-{i:05d}.parquet",
                num_rows=rows,
                num_bytes=1,
                first_id=first_id,
                sha256="",
                rows_per_group=rows_per_group,
            )
        )
        first_id += rows
    return Manifest(
        channels=1,
        image_px=None,
        classes=[],
        splits={"train": Split(num_rows=first_id, num_bytes=1, shards=shards)},
        num_found=first_id,
        num_ok=first_id,
        num_quarantined=0,
        num_duplicates=0,
        quarantine_reasons={},
        mean=[0.5],
        std=[0.5],
        config={},
        source_digest="",
    )


@st.composite
def plans(draw: Callable) -> EpochPlan:
    manifest = manifest_of(draw(st.lists(st.integers(1, 40), min_size=1, max_size=6)), draw(st.integers(1, 9)))
    index = Index.from_manifest(manifest, "train")
    if draw(st.booleans()):
        chosen = draw(st.lists(st.integers(0, index.num_samples - 1), min_size=1, unique=True))
        index = index.only(np.array(chosen))
    micro_batch, lanes = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 2, 3]))
    return EpochPlan(
        index=index,
        seed=draw(st.integers(0, 2**63)),
        batch=micro_batch * draw(st.integers(1, 5)) * lanes,
        lanes=lanes,
        micro_batch=micro_batch,
        num_workers=draw(st.integers(1, 4)),
        window=draw(st.integers(1, 100)),
        shuffle=draw(st.booleans()),
    )


def real(ids: np.ndarray) -> list[int]:
    return ids[ids != PLACEHOLDER].tolist()


@SETTINGS
@given(plans(), st.integers(0, 3))
def test_every_sample_stands_once_in_an_epoch(plan: EpochPlan, epoch: int) -> None:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    seen = [sample for step in steps for sample in real(plan.step_ids(step))]
    expected = plan.index.selected
    assert sorted(seen) == (list(range(plan.num_samples)) if expected is None else expected.tolist())


@SETTINGS
@given(plans(), st.integers(1, 5))
def test_a_step_has_the_same_samples_in_the_same_order_for_any_workers(plan: EpochPlan, num_workers: int) -> None:
    other = dataclasses.replace(plan, num_workers=num_workers)
    for step in range(2 * plan.steps_per_epoch):
        assert real(plan.step_ids(step)) == real(other.step_ids(step))


@SETTINGS
@given(plans())
def test_a_step_has_the_same_samples_for_any_micro_batch(plan: EpochPlan) -> None:
    other = dataclasses.replace(plan, micro_batch=1)
    for step in range(plan.steps_per_epoch):
        assert real(plan.step_ids(step)) == real(other.step_ids(step))


@SETTINGS
@given(plans())
def test_ranks_share_a_step_out_round_robin(plan: EpochPlan) -> None:
    for step in range(plan.steps_per_epoch):
        whole = plan.step_ids(step).reshape(-1, plan.micro_batch)
        assert len(whole) == plan.micro_batches_per_step
        for rank in range(plan.num_workers):
            np.testing.assert_array_equal(plan.step_ids(step, rank), whole[rank :: plan.num_workers].ravel())


@SETTINGS
@given(plans())
def test_planned_counts_the_real_samples_of_a_step(plan: EpochPlan) -> None:
    for step in range(plan.steps_per_epoch, 2 * plan.steps_per_epoch):
        assert len(real(plan.step_ids(step))) == plan.planned(step)


@SETTINGS
@given(plans(), st.data())
def test_reads_fill_each_wanted_slot_once_and_each_row_group_is_read_once(plan: EpochPlan, data: st.DataObject) -> None:
    window = data.draw(st.integers(0, plan.windows_per_epoch - 1))
    ids = plan.window_ids(1, window)
    start = data.draw(st.integers(0, len(ids) - 1))
    slots = np.arange(start, data.draw(st.integers(start + 1, len(ids))), data.draw(st.integers(1, 3)))
    reads = plan.window_reads(1, window, slots)
    assert sorted(slot for read in reads for slot in read.slots) == slots.tolist()
    assert len({(read.path, read.group) for read in reads}) == len(reads)
    first = {
        (plan.index.paths[s], int(g)): int(i)
        for s, g, i in zip(plan.index.shard, plan.index.group, plan.index.first_id)
    }
    for read in reads:
        np.testing.assert_array_equal(ids[read.slots], read.rows + first[read.path, read.group])


@SETTINGS
@given(plans())
def test_windows_hold_every_step_of_an_epoch_once(plan: EpochPlan) -> None:
    steps = [step for w in range(plan.windows_per_epoch) for step in plan.window_steps(2, w)]
    assert steps == list(range(2 * plan.steps_per_epoch, 3 * plan.steps_per_epoch))
    for w in range(plan.windows_per_epoch):
        assert len(plan.window_ids(2, w)) == sum(plan.planned(step) for step in plan.window_steps(2, w))


@SETTINGS
@given(plans())
def test_without_shuffling_samples_stand_in_storage_order(plan: EpochPlan) -> None:
    still = dataclasses.replace(plan, shuffle=False, lanes=1)
    seen = [sample for step in range(plan.steps_per_epoch) for sample in real(still.step_ids(step))]
    assert seen == sorted(seen)


@SETTINGS
@given(plans())
def test_a_lane_draws_on_consecutive_rows_of_the_window(plan: EpochPlan) -> None:
    """One lane's rows are those that come one after another as the row groups are visited, in all steps."""
    for window in range(plan.windows_per_epoch):
        ids = plan.window_ids(0, window)
        lane_of = np.arange(len(ids)) % plan.batch * plan.lanes // plan.batch
        order, _ = plan._order(0)
        group_of = np.searchsorted(plan.index.first_id, ids, side="right") - 1
        visited = np.empty(len(order), dtype=np.int64)
        visited[order] = np.arange(len(order))
        last = -1
        for lane in range(plan.lanes):
            places = visited[group_of[lane_of == lane]]
            if len(places):
                assert last <= places.min()
                last = places.max()


@pytest.mark.parametrize("groups_per_window", [8, 64])
def test_a_window_mixes_as_many_row_groups_as_it_holds(groups_per_window: int) -> None:
    """Class-sorted input, a class a row group: a batch draws on the window's row groups as a random one would."""
    rows_per_group, num_groups, batch = 16, 512, 128
    index = Index.from_manifest(manifest_of([rows_per_group * num_groups], rows_per_group), "train")
    window = rows_per_group * groups_per_window
    plan = EpochPlan(index=index, seed=3, batch=batch, micro_batch=batch, num_workers=1, window=window)
    ids = np.concatenate([plan.window_ids(0, w) for w in range(plan.windows_per_epoch)])
    # Both are permutations, so this is the correlation of ranks; 1 / sqrt(row groups) is its spread.
    assert abs(np.corrcoef(np.arange(len(ids)), ids)[0, 1]) < 4 / num_groups**0.5
    classes = [len(np.unique(row)) for row in (ids // rows_per_group).reshape(-1, batch)]
    expected = groups_per_window * (1 - (1 - 1 / groups_per_window) ** batch)
    assert np.mean(classes) == pytest.approx(expected, rel=0.1)


def test_the_plan_of_a_billion_images_is_that_of_its_row_groups() -> None:
    """Far fewer here, of as many rows each: what is held is some bytes a row group, whatever the rows."""
    index = Index.from_manifest(manifest_of([1_000_000] * 50, 250_000), "train")
    plan = EpochPlan(index=index, seed=0, batch=4096, micro_batch=64, num_workers=8, window=8192)
    held = sum(array.nbytes for array in (index.shard, index.group, index.first_id, index.num_rows))
    assert held == 20 * 200
    assert sum(len(read.rows) for read in plan.window_reads(3, plan.windows_per_epoch - 1, np.arange(64))) == 64
    assert sum(array.nbytes for array in plan._order(3)) == 16 * 200


def test_epochs_and_seeds_differ() -> None:
    index = Index.from_manifest(manifest_of([500, 500], 10), "train")
    plan = EpochPlan(index=index, seed=1, batch=50, micro_batch=10, num_workers=1, window=200)
    first = plan.step_ids(0).tolist()
    assert first != plan.step_ids(plan.steps_per_epoch).tolist()
    assert first != dataclasses.replace(plan, seed=2).step_ids(0).tolist()


def test_the_order_is_the_one_that_was_committed() -> None:
    """A change here changes what every resumed run sees."""
    index = Index.from_manifest(manifest_of([12, 8], 5), "train")
    plan = EpochPlan(index=index, seed=7, batch=4, micro_batch=2, num_workers=1, window=8)
    assert [plan.step_ids(step).tolist() for step in range(5)] == COMMITTED


COMMITTED = [[14, 15, 18, 12], [16, 13, 17, 19], [5, 2, 1, 0], [4, 3, 11, 10], [6, 7, 9, 8]]


def test_a_subset_has_so_many_of_each_class_and_depends_on_the_seed() -> None:
    ids, labels = np.arange(1000, 1100), np.arange(100) % 4
    chosen = choose_per_class(ids, labels, 5, seed=3)
    assert np.bincount(labels[chosen - 1000]).tolist() == [5, 5, 5, 5]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() != choose_per_class(ids, labels, 5, seed=4).tolist()
    assert set(chosen.tolist()) < set(choose_per_class(ids, labels, 6, seed=3).tolist())


def test_a_share_is_exact_per_class_at_least_one_and_nested() -> None:
    labels = np.repeat([0, 1, 2], [1000, 260, 3])
    ids = np.random.default_rng(0).permutation(len(labels)) + 5
    label_of = dict(zip(ids.tolist(), labels.tolist()))
    chosen = {share: choose_share(ids, labels, share, seed=3) for share in (0.001, 0.01, 0.1, 1.0)}
    counts = {share: np.bincount([label_of[i] for i in found.tolist()]).tolist() for share, found in chosen.items()}
    assert counts == {0.001: [1, 1, 1], 0.01: [10, 3, 1], 0.1: [100, 26, 1], 1.0: [1000, 260, 3]}
    assert set(chosen[0.001]) < set(chosen[0.01]) < set(chosen[0.1]) < set(chosen[1.0])
    assert chosen[0.1].tolist() != choose_share(ids, labels, 0.1, seed=4).tolist()


def test_a_share_and_a_count_of_one_size_are_the_same_images() -> None:
    ids, labels = np.arange(200), np.arange(200) % 2
    assert choose_share(ids, labels, 0.05, seed=3).tolist() == choose_per_class(ids, labels, 5, seed=3).tolist()


def test_a_subset_that_is_too_large_or_unlabelled_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the 2 images of the smallest class; try 2"):
        choose_per_class(np.arange(5), np.array([0, 0, 0, 1, 1]), 3, seed=0)
    with pytest.raises(ValueError, match="labelled dataset"):
        choose_per_class(np.arange(2), np.array([0, -1]), 1, seed=0)


def test_an_empty_or_missing_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no split 'val', only train"):
        Index.from_manifest(manifest_of([3], 2), "val")
    with pytest.raises(ValueError, match="has no images"):
        Index.from_manifest(manifest_of([], 2), "train")
