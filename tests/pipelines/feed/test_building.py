"""Through Ray Data every rank gets its micro-batches, whole and in order, from a folder as from S3."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae_core.config import AugmentConfig
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.feed.building import RankFeed, feed
from pipelines.feed.data_task import max_per_block
from pipelines.feed.executions import Executions
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.prepare import prepare
from pipelines.storage import open_storage
from tests.waiting import JOB_DEADLINE_S, join, let_pass

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray4"),
    # Ray Data 2.60 sets deprecated fields of its own context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]


@pytest.fixture
def dataset(few_prepared: str) -> tuple[str, Manifest]:
    return few_prepared, read_manifest(open_storage(few_prepared))


def segment_of(uri: str, manifest: Manifest, num_workers: int, *, train: bool, steps: tuple[int, int]) -> FeedSegment:
    plan = EpochPlan(
        index=Index.from_manifest(manifest, "train" if train else "test"),
        seed=3,
        batch=24 if train else 8 * num_workers,
        micro_batch=8,
        num_workers=num_workers,
        window=72,
        shuffle=train,
    )
    transform = Transform(train=train, image_px=(28, 28), channels=1, augment=AugmentConfig(), seed=4)
    first_step, last_step = steps
    return FeedSegment(
        dataset_uri=uri,
        plan=plan,
        transform=transform,
        first_step=first_step,
        last_step=last_step or plan.steps_per_epoch,
    )


def segments_of(uri: str, manifest: Manifest, num_workers: int) -> list[FeedSegment]:
    """Training from the middle of an epoch through two more, an evaluation between, and a short rest of two crops.

    The rest has larger images, as those of pretraining that grow.
    """
    rest = segment_of(uri, manifest, num_workers, train=True, steps=(25, 27))
    return [
        segment_of(uri, manifest, num_workers, train=True, steps=(4, 25)),
        segment_of(uri, manifest, num_workers, train=False, steps=(0, 0)),
        replace(rest, transform=replace(rest.transform, crops=2, image_px=(32, 36))),
    ]


def consume(
    segments: list[FeedSegment], num_workers: int, max_tasks: int | None = None, feeds: list[list[int]] | None = None
) -> list[list[MicroBatch]]:
    """Return the micro-batches that each rank gets; `feeds` lists the ranks that share one, as those of a node do."""
    import ray

    found: list[list[MicroBatch]] = [[] for _ in range(num_workers)]
    parts: dict[int, RankFeed] = {}
    for ranks in feeds or [None]:
        node = ray.get_runtime_context().get_node_id() if ranks else ""
        parts |= feed(segments, num_workers, max_tasks, ranks=ranks, node=node).split()

    def read(rank: int) -> None:
        found[rank].extend(parts[rank].micro_batches())

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread, JOB_DEADLINE_S)
    return found


def expected_of(segments: list[FeedSegment], rank: int) -> list[MicroBatch]:
    """Return the micro-batches of a rank, computed without Ray."""
    return [
        batch
        for segment in segments
        for window in range(segment.first_window, segment.first_window + segment.num_windows)
        for batch in window_micro_batches(segment, window)
        if batch.index % segment.plan.num_workers == rank
    ]


def assert_same(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert [(b.step, b.index) for b in found] == [(b.step, b.index) for b in expected]
    for batch, other in zip(found, expected, strict=True):
        for name in ("images", "ids", "labels", "weights"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_each_rank_gets_its_micro_batches_in_order(dataset: tuple[str, Manifest], num_workers: int) -> None:
    segments = segments_of(*dataset, num_workers)
    found = consume(segments, num_workers)
    for rank in range(num_workers):
        assert_same(found[rank], expected_of(segments, rank))


def test_ranks_get_the_same_from_a_feed_of_each_node(dataset: tuple[str, Manifest]) -> None:
    segments = [replace(s, plan=replace(s.plan, lanes=3)) for s in segments_of(*dataset, 3)]
    found = consume(segments, 3, max_tasks=1, feeds=[[0, 2], [1]])
    for rank in range(3):
        assert_same(found[rank], expected_of(segments, rank))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_executions_follow_one_another(
    dataset: tuple[str, Manifest], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.feed.executions._MIN_TASKS", 1)
    monkeypatch.setattr("pipelines.feed.executions._MIN_ROUNDS", 2)
    segments = segments_of(*dataset, num_workers)
    executions = Executions.of(sum(segment.num_windows for segment in segments), 1)
    assert len(executions.tasks(2)), "each dataset should have its turn, and one of them another"
    found = consume(segments, num_workers, max_tasks=1)
    for rank in range(num_workers):
        assert_same(found[rank], expected_of(segments, rank))


@pytest.mark.s3
def test_from_s3_equals_local(dataset: tuple[str, Manifest], few: Path, s3: str, tmp_path: Path) -> None:
    uri = f"{s3}/{tmp_path.name}"
    manifest = prepare(str(few), uri, PrepareConfig(rows_per_shard=64, rows_per_group=16))
    assert manifest == dataset[1]
    segments = segments_of(uri, manifest, 2)
    found = consume(segments, 2)
    local = segments_of(*dataset, 2)
    for rank in range(2):
        assert_same(found[rank], expected_of(local, rank))


def test_large_micro_batches_come_one_a_block(dataset: tuple[str, Manifest]) -> None:
    segment = segment_of(*dataset, 1, train=True, steps=(0, 3))
    large = Transform(train=True, image_px=(512, 512), channels=3, augment=AugmentConfig(), seed=4)
    segment = FeedSegment(
        dataset_uri=segment.dataset_uri, plan=segment.plan, transform=large, first_step=0, last_step=3
    )
    found = consume([segment], 1)
    assert [(b.step, b.index) for b in found[0]] == [(step, i) for step in range(3) for i in range(3)]
    assert found[0][0].images.shape == (8, 512, 512, 3)


@pytest.mark.parametrize(
    ("num_workers", "store_bytes", "most"),
    [(1, 2**40, 6), (7, 2**40, 6), (64, 2**40, 55), (1, 2**30, 3), (64, 2**30, 3), (1, 2**27, 1)],
)
def test_blocks_are_larger_for_many_ranks_and_smaller_for_small_stores(
    num_workers: int, store_bytes: int, most: int
) -> None:
    assert max_per_block(64 * 224 * 224 * 3, num_workers, store_bytes) == most


def test_a_feed_paused_for_longer_than_rays_guard_resumes(
    dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    guard_s = 1.0
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", guard_s)
    segment = segment_of(*dataset, 1, train=True, steps=(0, 90))
    found = feed([segment], 1, 1).micro_batches()
    first = next(found)
    let_pass(4 * guard_s)
    assert_same([first, *found], expected_of([segment], 0))


def test_an_error_of_a_task_reaches_the_worker(dataset: tuple[str, Manifest]) -> None:
    segments = segments_of("/no/such/dataset", dataset[1], 1)
    with pytest.raises(Exception, match=r"/no/such/dataset/train/part-0000\d.parquet does not exist"):
        list(feed(segments, 1).micro_batches())


def test_nothing_to_feed_and_a_plan_for_others_are_refused(dataset: tuple[str, Manifest]) -> None:
    with pytest.raises(ValueError, match="a plan for 2 workers cannot feed 3"):
        feed(segments_of(*dataset, 2), 3)
    for segments in ([], [segment_of(*dataset, 1, train=True, steps=(5, 5))]):
        with pytest.raises(ValueError, match="nothing to feed"):
            feed(segments, 1)


def test_a_blank_micro_batch_counts_for_nothing() -> None:
    blank = MicroBatch.blank(5, (4, 6), 3).to("cpu")
    assert blank.images.shape == (5, 4, 6, 3)
    assert blank.ids.tolist() == [-1] * 5
    assert not blank.weights.any()
