"""A listed epoch has every sample once, in windows of the stored order, whenever its shards are announced."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from mae_core.config import AugmentConfig
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.feed.building import feed
from pipelines.feed.listing import NOTHING, Announcements, ListedPlan, ListedSegment, announce_all
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.storage import open_storage
from tests.pipelines.feed.test_building import assert_same
from tests.waiting import JOB_DEADLINE_S, join

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray4"),
    # Ray Data 2.60 sets deprecated fields of its own context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]
BATCH, WINDOW, ROWS_PER_GROUP = 24, 48, 16
_keys = count()


@pytest.fixture
def dataset(few_prepared: str) -> tuple[str, Manifest]:
    return few_prepared, read_manifest(open_storage(few_prepared))


def new_announcements() -> Announcements:
    return Announcements(f"test-{next(_keys)}", ROWS_PER_GROUP)


def segment_of(uri: str, announcements: Announcements, num_workers: int, first_step: int = 0) -> ListedSegment:
    plan = EpochPlan(
        index=NOTHING, seed=3, batch=BATCH, micro_batch=8, num_workers=num_workers, window=WINDOW, is_listed=True
    )
    transform = Transform(train=True, image_px=(28, 28), channels=1, augment=AugmentConfig(), seed=4)
    return ListedSegment(
        dataset_uri=uri,
        plan=plan,
        transform=transform,
        first_step=first_step,
        last_step=20,
        announcements=announcements,
    )


def expected_of(uri: str, manifest: Manifest, num_workers: int, first_step: int = 0) -> list[MicroBatch]:
    """Return the micro-batches of all ranks, of the plan of the whole dataset and without Ray."""
    segment = segment_of(uri, new_announcements(), num_workers)
    plan = replace(segment.plan, index=Index.from_manifest(manifest, "train"))
    whole = FeedSegment(
        dataset_uri=uri, plan=plan, transform=segment.transform, first_step=first_step, last_step=plan.steps_per_epoch
    )
    windows = range(whole.first_window, whole.first_window + whole.num_windows)
    return [batch for window in windows for batch in window_micro_batches(whole, window)]


def consume(segment: ListedSegment, num_workers: int, max_tasks: int | None = 2) -> list[Iterator[MicroBatch]]:
    """Return the stream of each rank."""
    parts = feed([segment], num_workers, max_tasks, num_cpus=0).split()
    return [parts[rank].micro_batches() for rank in range(num_workers)]


def read_all(streams: list[Iterator[MicroBatch]]) -> list[list[MicroBatch]]:
    found: list[list[MicroBatch]] = [[] for _ in streams]
    threads = [threading.Thread(target=lambda r=rank: found[r].extend(streams[r])) for rank in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread, JOB_DEADLINE_S)
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("first_step", [0, 5])
def test_ranks_get_the_plan_of_the_whole_dataset_when_all_is_announced(
    dataset: tuple[str, Manifest], num_workers: int, first_step: int
) -> None:
    uri, manifest = dataset
    announcements = new_announcements()
    announce_all(announcements, manifest.splits["train"].shards)
    found = read_all(consume(segment_of(uri, announcements, num_workers, first_step), num_workers))
    expected = expected_of(uri, manifest, num_workers, first_step)
    for rank in range(num_workers):
        assert_same(found[rank], [batch for batch in expected if batch.index % num_workers == rank])


def test_a_window_comes_as_soon_as_its_shards_are_announced_and_the_epoch_ends_with_the_last(
    dataset: tuple[str, Manifest],
) -> None:
    uri, manifest = dataset
    shards = manifest.splits["train"].shards
    assert len(shards) >= 4
    announcements = new_announcements()
    (stream,) = consume(segment_of(uri, announcements, 1), 1)
    found: list[MicroBatch] = []
    num_announced = 0
    for number, shard in enumerate(shards):
        announcements.add(number, shard.path, shard.num_rows)
        num_announced += shard.num_rows
        # All that is ready comes, although nothing more is announced.
        ready = num_announced // WINDOW * (WINDOW // 8)
        found += [next(stream) for _ in range(ready - len(found))]
    announcements.complete(len(shards))
    found += list(stream)
    assert_same(found, expected_of(uri, manifest, 1))
    ids = np.concatenate([batch.ids.numpy() for batch in found])
    assert sorted(ids[ids >= 0].tolist()) == list(range(manifest.splits["train"].num_rows))


def test_every_window_is_a_run_of_the_stored_order_shuffled(dataset: tuple[str, Manifest]) -> None:
    plan = replace(segment_of("none", new_announcements(), 1).plan, index=Index.from_manifest(dataset[1], "train"))
    for window in range(plan.windows_per_epoch):
        ids = plan.window_ids(0, window)
        assert sorted(ids.tolist()) == list(range(window * WINDOW, window * WINDOW + len(ids)))
        assert ids.tolist() != sorted(ids.tolist())


def test_an_epoch_without_images_ends_at_once() -> None:
    announcements = new_announcements()
    (stream,) = consume(segment_of("none", announcements, 1), 1)
    announcements.complete(0)
    assert list(stream) == []


def test_a_rank_waits_for_a_step_until_it_is_announced_held_or_beyond_the_end() -> None:
    announcements = new_announcements()
    segment = segment_of("none", announcements, 2)
    plan = ListedPlan(segment.plan, segment.windows, num_expected=100)
    assert plan.steps_per_epoch == 5
    assert plan.await_step(0, lambda: True)
    announcements.add(0, "train/part-00000.parquet", 60)

    def never() -> bool:
        raise AssertionError("the step is ready")

    assert plan.await_step(0, lambda: False)
    assert plan.await_step(1, never)
    assert (plan.planned(0), plan.planned(1)) == (24, 24)
    ids = plan.step_ids(0).tolist() + plan.step_ids(1).tolist()
    assert sorted(id for id in ids if id >= 0) == list(range(48))
    seen: list[bool] = []
    waiting = threading.Thread(target=lambda: seen.append(plan.await_step(2, lambda: False)))
    waiting.start()
    assert waiting.is_alive(), "60 images are no window and a half"
    announcements.complete(1)
    join(waiting)
    assert seen == [True]
    assert plan.planned(2) == 12
    assert not plan.await_step(3, never)


def test_announced_shards_make_the_index_of_the_manifest(dataset: tuple[str, Manifest]) -> None:
    announcements, manifest = new_announcements(), dataset[1]
    announce_all(announcements, manifest.splits["train"].shards)
    segment = segment_of("none", announcements, 1)
    index, expected = segment.plan_of(10**6).index, Index.from_manifest(manifest, "train")
    assert index.paths == expected.paths
    for name in ("shard", "group", "first_id", "num_rows"):
        np.testing.assert_array_equal(getattr(index, name), getattr(expected, name))
