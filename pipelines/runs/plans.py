"""What a job reads, and in which order: its indexed dataset, its epoch plans, its phases and the segments of its feed.

The driver indexes the dataset of a job once (`index_dataset`) and passes the result to Ray Train's controller and to
the ranks, which make their plans of it. No other process reads the manifest or the label column, and a group that is
restarted, with whatever number of workers, sees the same samples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mae_core.config import Size
from mae_core.errors import UserError
from pipelines.dataset.manifest import Manifest
from pipelines.feed.listing import NOTHING, Announcements, ListedPlan, ListedSegment
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, Job, PretrainJob
from pipelines.storage import open_storage


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of a job: training steps [first_step, last_step), or one pass over a split in storage order ("read")."""

    kind: Literal["train", "read"]
    split: str
    first_step: int
    last_step: int
    image_px: Size


@dataclass(frozen=True, eq=False, kw_only=True)
class IndexedDataset:
    """A prepared dataset as one job reads it: its manifest, and the index of every split that the job reads."""

    manifest: Manifest
    indexes: Mapping[str, Index]


@dataclass(frozen=True, eq=False, kw_only=True)
class ListedDataset:
    """A dataset that is being prepared, as the first epoch of a job reads it."""

    announcements: Announcements
    most_samples: int
    """Most training images that it may have."""
    num_expected: int
    """Training images to expect, of which schedule and display are made while their number is unknown."""


IndexedJob: TypeAlias = tuple[Job, IndexedDataset | ListedDataset]


def index_dataset(job: Job, manifest: Manifest) -> IndexedDataset:
    """Index the splits that the job reads.

    Reads the label column if the job trains on some samples of each class. Raises UserError if a class has fewer, if
    a split is absent or empty, or if an augmentation does not suit the images.
    """
    _check_augmentations(job)
    only_train = IndexedDataset(manifest=manifest, indexes={"train": train_index(job, manifest)})
    steps_per_epoch = train_plan(job, only_train).steps_per_epoch
    splits = {phase.split for phase in phases(job, steps_per_epoch, 0, frozenset(manifest.splits))} - {"train"}
    others = {split: _labelled_index(job, manifest, split) for split in sorted(splits)}
    return IndexedDataset(manifest=manifest, indexes={**only_train.indexes, **others})


def _check_augmentations(job: Job) -> None:
    """Raise UserError for colour operations on images that are not in colour, and quarter turns of oblong ones."""
    augment, (image_px, channels) = job.config.augment, job.input
    if augment.rand_augment and (job.pixels.values is not None or channels not in (1, 3)):
        kind = "8 bits" if job.pixels.values is None else job.pixels.values.dtype
        raise UserError(
            f"rand_augment {augment.rand_augment} changes colours of 8-bit photographs, but the images are {kind} in "
            f"{channels} channels; try --augment.rand-augment '' with --augment.flip-vertical --augment.quarter-turns"
        )
    sizes = [size for _, size in job.stages] if isinstance(job, PretrainJob) else [image_px]
    oblong = next((size for size in sizes if size[0] != size[1]), None)
    if augment.quarter_turns and oblong:
        raise UserError(
            f"quarter_turns need square images, not {oblong[0]} x {oblong[1]} px; leave them out, or try "
            f"{'--image-px' if oblong == image_px else '--progressive.first-px'} {oblong[0]} {oblong[0]}"
        )


def train_index(job: Job, manifest: Manifest) -> Index:
    """Return the samples that the job trains on: the training split, or the labelled subset of a classifier."""
    index = _labelled_index(job, manifest, "train")
    data, seed = job.config.data, job.config.seed
    if data.labels_per_class is not None:
        return index.take_per_class(open_storage(data.uri), data.labels_per_class, seed=seed)
    share = job.config.label_share if isinstance(job, ClassifyJob) else None
    return index if share is None else index.take_share(open_storage(data.uri), share, seed=seed)


def _labelled_index(job: Job, manifest: Manifest, split: str) -> Index:
    """Index a split; for a classifier only its labelled images, if the manifest says that others have no label."""
    index = Index.from_manifest(manifest, split)
    if isinstance(job, PretrainJob) or not manifest.num_unlabelled.get(split):
        return index
    return index.take_labelled(open_storage(job.config.data.uri))


def train_plan(job: Job, dataset: IndexedDataset) -> EpochPlan:
    """Return the shuffled epoch plan of the job's training samples."""
    return _plan(job, dataset.indexes["train"])


def listed_plan(job: Job, dataset: ListedDataset, first_step: int) -> ListedPlan:
    """Return the plan of a first epoch from this step on, which grows while its samples are prepared."""
    segment = _listed_segment(job, dataset, first_step)
    return ListedPlan(segment.plan, segment.windows, dataset.num_expected)


def _plan(job: Job, index: Index, *, is_listed: bool = False) -> EpochPlan:
    data = job.reading.data
    return EpochPlan(
        index=index,
        seed=job.config.seed,
        batch=data.batch,
        micro_batch=data.micro_batch,
        num_workers=job.compute.num_workers,
        window=data.window,
        shuffle=True,
        lanes=data.lanes,
        is_listed=is_listed,
    )


def read_plan(job: Job, dataset: IndexedDataset, split: str) -> EpochPlan:
    """Return the plan of one pass over a split in storage order, padded to a multiple of the number of workers."""
    compute, data = job.compute, job.reading.data
    return EpochPlan(
        index=dataset.indexes[split],
        seed=job.config.seed,
        batch=data.micro_batch * compute.num_workers,
        micro_batch=data.micro_batch,
        num_workers=compute.num_workers,
        window=data.window,
        shuffle=False,
        lanes=1 if data.lanes == 1 else compute.num_workers,
    )


def last_step(job: Job, steps_per_epoch: int) -> int:
    """Return the number of steps after which training ends, those of the run that the job extends included."""
    return (job.first_epoch + job.reading.epochs) * steps_per_epoch


def phases(job: Job, steps_per_epoch: int, first_step: int, splits: frozenset[str]) -> list[Phase]:
    """Return the phases that remain after `first_step` steps; a pure function, so that driver and workers agree."""
    total, (image_px, _) = last_step(job, steps_per_epoch), job.input

    def train(start: int, stop: int, size: Size = image_px) -> Phase:
        return Phase(kind="train", split="train", first_step=start, last_step=stop, image_px=size)

    def read(split: str, step: int) -> Phase:
        return Phase(kind="read", split=split, first_step=step, last_step=step, image_px=image_px)

    if isinstance(job, PretrainJob):
        starts = [(epoch * steps_per_epoch, size) for epoch, size in job.stages]
        stops = [start for start, _ in starts[1:]] + [total]
        return [
            train(max(start, first_step), stop, size)
            for (start, size), stop in zip(starts, stops, strict=True)
            if first_step < stop
        ]
    final = read(job.config.eval_split, total)
    if job.caches_features:
        return [read("train", 0), final]
    found: list[Phase] = []
    start = first_step
    every = job.config.eval_every_epochs * steps_per_epoch
    for stop in (*range(every, total, every), total):
        if stop > first_step:
            found.append(train(start, stop))
            start = stop
        if first_step <= stop < total and "val" in splits:
            found.append(read("val", stop))
    return [*found, final]


def _train_transform(job: Job) -> Transform:
    image_px, channels = job.input
    return Transform(
        train=True,
        image_px=image_px,
        channels=channels,
        augment=job.config.augment,
        seed=job.config.seed,
        crops=job.config.crops_per_image if isinstance(job, PretrainJob) else 1,
        values=job.pixels.values,
    )


def _listed_segment(job: Job, dataset: ListedDataset, first_step: int) -> ListedSegment:
    assert isinstance(job, PretrainJob), "classifiers train on prepared datasets"
    return ListedSegment(
        dataset_uri=job.config.data.cache,
        plan=_plan(job, NOTHING, is_listed=True),
        transform=dataclasses.replace(_train_transform(job), image_px=job.stages[0][1]),
        first_step=first_step,
        last_step=-(-dataset.most_samples // job.reading.data.batch),
        announcements=dataset.announcements,
    )


def segments(job: Job, dataset: IndexedDataset | ListedDataset, first_step: int) -> list[FeedSegment]:
    """Return the job's phases that remain after `first_step` steps, as segments of a feed.

    Of a dataset that is being prepared, this is the first epoch alone.
    """
    if isinstance(dataset, ListedDataset):
        found = _listed_segment(job, dataset, first_step)
        return [found] if found.num_windows else []
    plan, read_plans = train_plan(job, dataset), {split: read_plan(job, dataset, split) for split in dataset.indexes}
    transform = _train_transform(job)
    read_transform = dataclasses.replace(transform, train=False, crops=1)
    found = []
    for phase in phases(job, plan.steps_per_epoch, first_step, frozenset(dataset.manifest.splits)):
        train = phase.kind == "train"
        found.append(
            FeedSegment(
                dataset_uri=job.config.data.uri,
                plan=plan if train else read_plans[phase.split],
                transform=dataclasses.replace(transform, image_px=phase.image_px) if train else read_transform,
                first_step=phase.first_step if train else 0,
                last_step=phase.last_step if train else read_plans[phase.split].steps_per_epoch,
            )
        )
    return found


def first_steps(jobs: Sequence[IndexedJob]) -> list[int | None]:
    """Return the step from which each job continues, from the checkpoints in its folder; None if it has a result."""
    folders = [RunFolder(job.folder) for job, _ in jobs]
    return [None if folder.read_result() is not None else folder.checkpoints.latest_step() for folder in folders]


def remaining_segments(jobs: Sequence[IndexedJob], steps: Sequence[int | None]) -> list[FeedSegment]:
    """Return the segments that remain of all jobs after their `first_steps`."""
    return [
        segment
        for (job, dataset), step in zip(jobs, steps, strict=True)
        if step is not None
        for segment in segments(job, dataset, step)
    ]
