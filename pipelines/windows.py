"""A shuffle window of the epoch plan becomes micro-batches: rows read once, decoded, cropped. No Ray in here."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import crop_boxes, flips, rand_augment
from mae_core.config import AugmentConfig, Size
from mae_core.randomness import Purpose, seed_of
from pipelines.decode import Scratch, crop_resize, decode, evaluation_view
from pipelines.jpeg.slice import decode_crop
from pipelines.plan import PLACEHOLDER, EpochPlan, GroupRead, Ids
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_COLUMNS = ["image", "label", "height_px", "width_px", "orientation", "segment_offsets"]
_READ_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What happens to a sample on its way into a micro-batch; random only in training, keyed by the seed."""

    train: bool
    image_px: Size
    channels: int
    augment: AugmentConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps [first_step, last_step) of a plan over one prepared dataset; steps count over all epochs."""

    dataset_uri: str
    plan: EpochPlan
    transform: Transform
    first_step: int
    last_step: int

    @property
    def first_window(self) -> int:
        """The window of first_step, counted over all epochs."""
        return self._window_of(self.first_step)

    @property
    def num_windows(self) -> int:
        if self.last_step <= self.first_step:
            return 0
        return self._window_of(self.last_step - 1) - self.first_window + 1

    @property
    def micro_batch_bytes(self) -> int:
        """Size of one micro-batch's pixels."""
        height_px, width_px = self.transform.image_px
        return self.plan.micro_batch * height_px * width_px * self.transform.channels

    def _window_of(self, step: int) -> int:
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        return epoch * self.plan.windows_per_epoch + within // self.plan.steps_per_window


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass on one rank. A placeholder has id -1, weight 0 and black pixels.

    A sample that could not be decoded keeps its id and label, with weight 0. Without labels they are -1.
    """

    images: Tensor
    """uint8 [batch height width channels]"""
    ids: Tensor
    """int64 [batch]"""
    labels: Tensor
    """int64 [batch]"""
    weights: Tensor
    """float32 [batch]"""
    step: int
    """The step of its segment's plan that it belongs to."""
    index: int
    """Its number among the step's micro-batches of all ranks."""

    @classmethod
    def blank(cls, size: int, image_px: Size, channels: int) -> "MicroBatch":
        """A micro-batch of placeholders."""
        return cls(
            images=torch.zeros(size, *image_px, channels, dtype=torch.uint8),
            ids=torch.full((size,), PLACEHOLDER, dtype=torch.int64),
            labels=torch.full((size,), -1, dtype=torch.int64),
            weights=torch.zeros(size),
            step=0,
            index=0,
        )

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on another device; from pinned memory the copy does not block."""
        move = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "ids", "labels", "weights")
        }
        return MicroBatch(**move, step=self.step, index=self.index)


def window_micro_batches(segment: Segment, window: int) -> Iterator[MicroBatch]:
    """What one task yields: micro-batches of all ranks for one window, counted over all epochs of the segment."""
    plan, transform = segment.plan, segment.transform
    epoch, within = divmod(window, plan.windows_per_epoch)
    steps = plan.window_steps(epoch, within)
    steps = range(max(steps.start, segment.first_step), min(steps.stop, segment.last_step))
    slots = range(plan.micro_batch_slots(steps[0])[0].start, plan.micro_batch_slots(steps[-1])[-1].stop)
    samples = _read(open_storage(segment.dataset_uri), plan, epoch, within, slots)
    view = _Views(transform, epoch, samples)
    for step in steps:
        for index, wanted in enumerate(plan.micro_batch_slots(step)):
            batch = MicroBatch.blank(plan.micro_batch, transform.image_px, transform.channels)
            view.fill(batch, range(wanted.start - slots.start, wanted.stop - slots.start))
            yield MicroBatch(batch.images, batch.ids, batch.labels, batch.weights, step=step, index=index)


@dataclass(frozen=True)
class _Samples:
    """Stored rows in the order of training."""

    images: list[bytes]
    ids: Ids
    labels: Ids
    heights_px: Ids
    widths_px: Ids
    orientations: list[int]
    segment_offsets: list[NDArray[np.int32]]
    """Of sliceable JPEGs; empty for other images."""


def _read(storage: Storage, plan: EpochPlan, epoch: int, window: int, slots: range) -> _Samples:
    """The window's samples in those slots, each row group read once."""
    reads = plan.window_reads(epoch, window, slots)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        tables = list(pool.map(lambda read: _read_group(storage, read), reads))
    order = np.argsort(np.concatenate([read.slots for read in reads]), kind="stable")
    table = pa.concat_tables(tables).combine_chunks()
    images = table["image"].to_pylist()
    lists = table["segment_offsets"].combine_chunks()
    offsets = np.split(lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().fill_null(0).to_numpy())[:-1])

    def column(name: str) -> Ids:
        return table[name].fill_null(-1).to_numpy().astype(np.int64)[order]

    return _Samples(
        images=[images[i] for i in order.tolist()],
        ids=plan.window_ids(epoch, window)[slots.start : slots.stop],
        labels=column("label"),
        heights_px=column("height_px"),
        widths_px=column("width_px"),
        orientations=column("orientation").tolist(),
        segment_offsets=[offsets[i] for i in order.tolist()],
    )


def _read_group(storage: Storage, read: GroupRead) -> pa.Table:
    with storage.open_input(read.path) as source, pq.ParquetFile(source) as file:
        return file.read_row_group(read.group, columns=_COLUMNS, use_threads=False).take(pa.array(read.rows))


class _Views:
    """The samples of a window as the model sees them in one epoch."""

    def __init__(self, transform: Transform, epoch: int, samples: _Samples) -> None:
        self._transform, self._epoch, self._samples = transform, epoch, samples
        self._scratch = Scratch()
        self._boxes: list[Any] = []
        self._flips: list[bool] = []
        # "none" is the view of evaluation, but for the flip.
        self._crops = transform.train and transform.augment.crop != "none"
        if transform.train:
            mirrored = flips(transform.augment, seed=transform.seed, epoch=epoch, sample_ids=samples.ids)
            self._flips = mirrored.tolist()
        if self._crops:
            boxes = crop_boxes(
                transform.augment,
                seed=transform.seed,
                epoch=epoch,
                sample_ids=samples.ids,
                heights_px=samples.heights_px,
                widths_px=samples.widths_px,
            )
            self._boxes = boxes.tolist()

    def fill(self, batch: MicroBatch, places: range) -> None:
        """The batch's first rows hold the samples at those places; one that cannot be decoded has weight 0."""
        size, samples = len(places), self._samples
        batch.ids[:size] = torch.from_numpy(samples.ids[places.start : places.stop])
        batch.labels[:size] = torch.from_numpy(samples.labels[places.start : places.stop])
        images, weights = batch.images.numpy(), batch.weights.numpy()
        for row, place in enumerate(places):
            try:
                images[row] = self._pixels(place)
                weights[row] = 1
            except ValueError as error:
                log.warning("sample %d counts for nothing: %s", samples.ids[place], error)

    def _pixels(self, place: int) -> NDArray[np.uint8]:
        transform, samples = self._transform, self._samples
        content, orientation = samples.images[place], samples.orientations[place]
        if self._crops:
            offsets, box = samples.segment_offsets[place], tuple(self._boxes[place])
            pixels, box = decode_crop(content, transform.channels, orientation, offsets, box, self._scratch)
            pixels = crop_resize(pixels, box, self._flips[place], transform.image_px, self._scratch)
        else:
            pixels = decode(content, transform.channels, orientation, self._scratch)
            pixels = evaluation_view(pixels, transform.image_px)
            pixels = pixels[:, ::-1] if transform.train and self._flips[place] else pixels
        if not transform.train:
            return pixels
        if transform.augment.rand_augment:
            key = seed_of(transform.seed, Purpose.AUGMENT, self._epoch, int(samples.ids[place]), 0)
            pixels = _rand_augment(pixels, transform.augment.rand_augment, key)
        return pixels


def _rand_augment(pixels: NDArray[np.uint8], recipe: str, seed_key: int) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    return np.asarray(rand_augment(image, recipe, seed_key)).reshape(pixels.shape)
