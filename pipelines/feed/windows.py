"""Turn a shuffle window into micro-batches: read its samples once, decode and crop them.

Imports neither Ray nor torch, which would cost each process of data tasks two seconds and 0.6 GB.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.randomness import Purpose, seed_of
from mae_core.views import crop_boxes, flips, rand_augment, turns
from pipelines.dataset.row_groups import RowGroups
from pipelines.feed.blocks import SampleArrays
from pipelines.feed.plan import PLACEHOLDER, EpochPlan, GroupRead, Ids
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.images.crops import crop_into, crop_values_into
from pipelines.images.decode import ImageArray, Scratch, decode, evaluation_view, unit_pixels
from pipelines.images.decode.opening import ANY_SIZE, limits_of_stored
from pipelines.images.jpeg.partial_decode import decode_crop

log = logging.getLogger(__name__)

_COLUMNS = ["image", "label", "height_px", "width_px", "orientation", "segment_offsets"]
_READ_THREADS = 8


class Window:
    """The samples of a window, and the micro-batches of some or all ranks that they form, in training order."""

    def __init__(self, segment: FeedSegment, window: int, ranks: Sequence[int] | None = None) -> None:
        """Read the window, whose number counts over all epochs of the segment; with `ranks`, only their samples."""
        plan = segment.plan_of(window)
        self._transform, self._size = segment.transform, plan.micro_batch
        epoch, within = divmod(window, plan.windows_per_epoch)
        steps = plan.window_steps(epoch, within)
        steps = range(max(steps.start, segment.first_step), min(steps.stop, segment.last_step))
        wanted = frozenset(range(plan.num_workers) if ranks is None else ranks)
        found = [
            (step, index, slots)
            for step in steps
            for index, slots in enumerate(plan.micro_batch_slots(step))
            if index % plan.num_workers in wanted
        ]
        stops = list(accumulate(len(slots) for *_, slots in found))
        self._micro_batches = [
            (step, index, range(stop - len(slots), stop)) for (step, index, slots), stop in zip(found, stops)
        ]
        """Step, number within the step, and positions among the samples that are read."""
        slots = np.concatenate([np.arange(slots.start, slots.stop) for *_, slots in found])
        self._views = _Views(segment.transform, epoch, _read(segment.row_groups, plan, epoch, within, slots))

    def __len__(self) -> int:
        return len(self._micro_batches)

    @property
    def images_shape(self) -> tuple[int, ...]:
        """Shape of one micro-batch's image array."""
        transform = self._transform
        return transform.crops * self._size, *transform.image_px, transform.channels

    @property
    def images_dtype(self) -> type[np.generic]:
        """Type of its elements."""
        return np.uint8 if self._transform.values is None else np.float32

    def micro_batch(self, number: int, memory: NDArray[Any] | None = None) -> SampleArrays:
        """Decode a micro-batch, into `memory` of shape `images_shape` if given."""
        step, index, positions = self._micro_batches[number]
        images = np.empty(self.images_shape, self.images_dtype) if memory is None else memory
        ids, labels, weights = self._views.fill(images, positions, self._size)
        return SampleArrays(images, ids, labels, weights, step=step, index=index)


@dataclass(frozen=True)
class _Samples:
    """Stored rows in training order."""

    images: list[memoryview]
    """Encoded images, views of the row groups as they were read."""
    ids: Ids
    labels: Ids
    heights_px: Ids
    widths_px: Ids
    orientations: list[int]
    segment_offsets: list[NDArray[np.int32]]
    """Restart segments of JPEGs that can be decoded in part; empty for other images."""


def _read(row_groups: RowGroups, plan: EpochPlan, epoch: int, window: int, slots: Ids) -> _Samples:
    """Read the samples in these slots of a window, each row group once."""
    ids, reads = plan.window_ids(epoch, window)[slots], plan.window_reads(epoch, window, slots)
    if not reads:  # The ranks of a node have nothing but placeholders at the end of a small epoch.
        return _Samples([], ids, ids, ids, ids, [], [])
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = list(pool.map(lambda read: _read_group(row_groups, read), reads))
    order = np.argsort(np.concatenate([read.slots for read in reads]), kind="stable")
    images = [image for part in parts for image in part[0]]
    table = pa.concat_tables([part[1] for part in parts]).combine_chunks()
    lists = table["segment_offsets"].combine_chunks()
    offsets = np.split(lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().fill_null(0).to_numpy())[:-1])

    def column(name: str) -> Ids:
        return table[name].fill_null(-1).to_numpy().astype(np.int64)[order]

    return _Samples(
        images=[images[i] for i in order.tolist()],
        ids=ids,
        labels=column("label"),
        heights_px=column("height_px"),
        widths_px=column("width_px"),
        orientations=column("orientation").tolist(),
        segment_offsets=[offsets[i] for i in order.tolist()],
    )


def _read_group(row_groups: RowGroups, read: GroupRead) -> tuple[list[memoryview], pa.Table]:
    """Read the images of a row group without copying them, and the other columns of their rows."""
    table = row_groups.read(read.path, read.group, _COLUMNS)
    images = [image for chunk in table["image"].chunks for image in _values(chunk)]
    return [images[i] for i in read.rows.tolist()], table.drop_columns(["image"]).take(pa.array(read.rows))


def _values(chunk: pa.BinaryArray) -> Iterator[memoryview]:
    """Yield each row's bytes without copying them: pyarrow's own scalars take fifty times as long."""
    _, offsets, content = chunk.buffers()
    if len(chunk):
        values = memoryview(b"" if content is None else content)
        bounds: list[int] = np.frombuffer(offsets, np.int32, len(chunk) + 1, 4 * chunk.offset).tolist()
        yield from (values[start:stop] for start, stop in pairwise(bounds))


class _Views:
    """The samples of a window as the model sees them in one epoch: decoded, cropped and augmented."""

    def __init__(self, transform: Transform, epoch: int, samples: _Samples) -> None:
        self._transform, self._epoch, self._samples = transform, epoch, samples
        self._scratch = Scratch()
        # Both are indexed by crop, then by sample.
        self._boxes: list[list[Any]] = []
        self._flips: list[list[bool]] = []
        self._turns: list[tuple[list[bool], list[int]]] = []
        turned = transform.augment.flip_vertical or transform.augment.quarter_turns
        # "none" is the evaluation view, except for the flip.
        self._crops = transform.train and transform.augment.crop != "none"
        for view in range(transform.crops if transform.train else 0):
            keys: dict[str, Any] = {"seed": transform.seed, "epoch": epoch, "sample_ids": samples.ids, "view": view}
            self._flips.append(flips(transform.augment, **keys).tolist())
            if turned:
                upside_down, quarters = turns(transform.augment, **keys)
                self._turns.append((upside_down.tolist(), quarters.tolist()))
            if self._crops:
                heights_px, widths_px = np.maximum(samples.heights_px, 1), np.maximum(samples.widths_px, 1)
                sizes: dict[str, Any] = {"heights_px": heights_px, "widths_px": widths_px}
                self._boxes.append(crop_boxes(transform.augment, **keys, **sizes).tolist())

    def fill(self, images: NDArray[Any], positions: range, size: int) -> tuple[Ids, Ids, NDArray[np.float32]]:
        """Write the views of these samples into `images`; return ids, labels and weights of `size` samples.

        A sample that cannot be decoded and a placeholder are black, with weight 0.
        """
        samples, weights = self._samples, np.zeros(size, np.float32)
        ids, labels = np.full(size, PLACEHOLDER, np.int64), np.full(size, -1, np.int64)
        ids[: len(positions)] = samples.ids[positions.start : positions.stop]
        labels[: len(positions)] = samples.labels[positions.start : positions.stop]
        by_view = images.reshape(-1, size, *images.shape[1:])
        by_view[:, len(positions) :] = 0
        for row, position in enumerate(positions):
            try:
                self._decode(position, by_view[:, row])
                weights[row] = 1
            except ValueError as error:
                by_view[:, row] = 0
                log.warning("sample %d could not be decoded and gets weight 0: %s", samples.ids[position], error)
        return ids, labels, weights

    def _decode(self, position: int, images: NDArray[Any]) -> None:
        """Decode a sample once, and write its training views, or its evaluation view, into `images`."""
        transform, samples = self._transform, self._samples
        if self._crops and transform.values is not None:
            self._crop_values(position, images, transform.values)
        elif self._crops:
            self._crop(position, images)
        else:
            content, orientation = bytes(samples.images[position]), samples.orientations[position]
            if transform.values is None:
                pixels = decode(content, transform.channels, orientation, self._scratch)
            else:
                pixels = unit_pixels(content, transform.channels, transform.values, ANY_SIZE)
            pixels = evaluation_view(pixels, transform.image_px)
            images[0] = pixels[:, ::-1] if transform.train and self._flips[0][position] else pixels
        for (upside_down, quarters), view in zip(self._turns, images):
            if upside_down[position]:
                view[:] = view[::-1].copy()
            if quarters[position]:
                view[:] = np.rot90(view, quarters[position]).copy()
        if transform.train and transform.augment.rand_augment:
            for view, pixels in enumerate(images):
                key = seed_of(transform.seed, Purpose.AUGMENT, self._epoch, int(samples.ids[position]), view)
                images[view] = _rand_augment(pixels, transform.augment.rand_augment, key)

    def _crop(self, position: int, images: ImageArray) -> None:
        """Write a keyed crop of the sample into each of `images`."""
        samples = self._samples
        if min(samples.heights_px[position], samples.widths_px[position]) < 1:
            raise UserError(f"its row says {samples.heights_px[position]} x {samples.widths_px[position]} px")
        boxes = [tuple(boxes[position]) for boxes in self._boxes]
        # With several crops, parts of the image would be decoded more than once.
        offsets = samples.segment_offsets[position][: None if len(boxes) == 1 else 0]
        image = samples.images[position], self._transform.channels, samples.orientations[position], offsets
        pixels, boxes[0] = decode_crop(*image, boxes[0], self._scratch)
        for out, box, mirrored in zip(images, boxes, self._flips):
            crop_into(out, pixels, box, mirrored[position], self._scratch)

    def _crop_values(self, position: int, images: NDArray[np.float32], values_range: ValueRange) -> None:
        """Write a keyed crop of the sample's values into each of `images`."""
        content = self._samples.images[position]
        limits = limits_of_stored(content, values_range)
        for out, boxes, mirrored in zip(images, self._boxes, self._flips):
            crop_values_into(out, content, limits, tuple(boxes[position]), mirrored[position], self._scratch)


def _rand_augment(pixels: ImageArray, recipe: str, seed_key: int) -> ImageArray:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    return np.asarray(rand_augment(image, recipe, seed_key)).reshape(pixels.shape)
