"""A first epoch on a dataset in preparation ends with a checkpoint for the others; stopped, it continues."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from mae_core.config import ModelConfig, OptimConfig
from mae_core.state import unpack
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.feed.listing import Announcements, ListedSegment, announce_all
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.plan import Index
from pipelines.feed.windows import Window
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import ListedDataset, index_dataset, segments
from pipelines.worker import pretraining
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.stop_gate import StopRequested
from tests.digest import tensors_digest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray4")]
_keys = count()


def job_in(folder: Path, uri: str, manifest: Manifest) -> PretrainJob:
    config = PretrainConfig(
        epochs=2,
        # Steps of 12 make the last of 4 steps short, and 2 windows of 2 steps.
        data=DataConfig(uri=uri, cache=uri, batch=12, micro_batch=4, window=24),
        model=ModelConfig(arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2),
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=1.0),
        checkpoint=CheckpointConfig(keep=9),
    )
    return PretrainJob(folder=str(folder), config=config, pixels=pixels_of(manifest, 3), listed="listed-0")


def announced(manifest: Manifest) -> ListedDataset:
    announcements = Announcements(f"worker-{next(_keys)}", rows_per_group=8)
    announce_all(announcements, manifest.splits["train"].shards)
    return ListedDataset(announcements=announcements, most_samples=60, num_expected=50)


def rank_of(job: PretrainJob) -> Rank:
    return Rank(index=0, world=1, device=torch.device("cpu"), compute=ComputeConfig())


def batches_of(job: PretrainJob, dataset: ListedDataset, first_step: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of the epoch from a step on, without Ray Data."""
    (segment,) = segments(job, dataset, first_step)
    assert isinstance(segment, ListedSegment)
    for window in range(segment.first_window, segment.first_window + segment.windows.num_ready()[0]):
        opened = Window(segment, window)
        yield from (MicroBatch.of(opened.micro_batch(number)) for number in range(len(opened)))


def train_listed(job: PretrainJob, manifest: Manifest, stop_before: int | None = None) -> None:
    folder, dataset = RunFolder(job.folder), announced(manifest)
    newest = folder.checkpoints.latest_step()
    checkpoint = folder.checkpoints.load(newest) if newest else None
    entered = count(newest)

    def enter() -> None:
        if next(entered) == stop_before:
            raise StopRequested

    feed = Feed(batches_of(job, dataset, newest), enter)
    pretraining.run_listed_epoch(job, dataset, rank_of(job), feed, folder, checkpoint)


def train_rest(job: PretrainJob, manifest: Manifest) -> tuple[list[int], str]:
    """Train the other epochs; return their sample ids in order, and a digest of the weights at the end."""
    folder, dataset = RunFolder(job.folder), index_dataset(job, manifest)
    step = folder.checkpoints.latest_step()
    (segment,) = segments(job, dataset, step)
    windows = range(segment.first_window, segment.first_window + segment.num_windows)
    batches = [batch for window in windows for batch in window_micro_batches(segment, window)]
    pretraining.run(job, dataset, rank_of(job), Feed(iter(batches)), folder, folder.checkpoints.load(step))
    final = folder.checkpoints.load(folder.checkpoints.latest_step())
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    return ids, tensors_digest(unpack(final.files["model.safetensors"]))


def test_the_epoch_ends_after_as_many_steps_as_any_other_and_the_next_is_as_if_prepared_before(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    uri, manifest = tiles
    job = job_in(tmp_path / "run", uri, manifest)
    train_listed(job, manifest)
    folder = RunFolder(job.folder)
    assert folder.checkpoints.latest_step() == 4, "40 images in steps of 12, although 50 were expected"
    assert folder.read_result() is None
    ids, _ = train_rest(job, manifest)
    before = index_dataset(job, manifest)
    (prepared_first,) = segments(job, before, 0)
    plan = prepared_first.plan
    assert ids == [id for step in range(4, 8) for id in plan.step_ids(step).tolist()]
    assert folder.checkpoints.latest_step() == 8


def test_stopped_at_any_step_it_continues_bit_for_bit(tiles: tuple[str, Manifest], tmp_path: Path) -> None:
    uri, manifest = tiles
    calm = job_in(tmp_path / "calm", uri, manifest)
    train_listed(calm, manifest)
    expected = train_rest(calm, manifest)
    for stop_before in (1, 2, 3):
        job = job_in(tmp_path / f"stopped-{stop_before}", uri, manifest)
        with pytest.raises(StopRequested):
            train_listed(job, manifest, stop_before)
        assert RunFolder(job.folder).checkpoints.latest_step() == stop_before
        train_listed(job, manifest)
        assert train_rest(job, manifest) == expected


def test_every_kept_sample_is_seen_once_with_the_crops_of_its_first_epoch(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    uri, manifest = tiles
    job = job_in(tmp_path / "run", uri, manifest)
    listed = list(batches_of(job, announced(manifest), 0))
    prepared = index_dataset(job, manifest)
    (segment,) = segments(job, prepared, 0)
    first = [batch for window in range(2) for batch in window_micro_batches(segment, window)]

    def images_by_id(batches: list[MicroBatch]) -> dict[int, bytes]:
        ids = torch.cat([batch.ids for batch in batches]).tolist()
        images = torch.cat([batch.images for batch in batches])
        assert sorted(id for id in ids if id >= 0) == list(range(40))
        return {id: image.numpy().tobytes() for id, image in zip(ids, images) if id >= 0}

    assert images_by_id(listed) == images_by_id(first)
    assert Index.from_manifest(manifest, "train").num_samples == 40
