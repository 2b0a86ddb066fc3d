"""What a window task yields: the plan's samples, each as its key says, whatever the workers and the start."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mae_core.config import AugmentConfig
from mae_core.normalization import ValueRange
from mae_core.values import limits_of, to_unit
from mae_core.views import crop_boxes, flips, turns
from pipelines.dataset.manifest import Manifest, Shard, Split
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.plan import PLACEHOLDER, EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.feed.windows import _values
from pipelines.images.crops import crop_into, crop_values_into
from pipelines.images.decode import Scratch, decode, evaluation_view, inspect
from pipelines.images.decode.stored import pack
from pipelines.images.jpeg import read_header
from pipelines.images.jpeg.index import indexed
from pipelines.images.jpeg.restarts import rewritten
from pipelines.images.jpeg.scan import read_scan
from pipelines.prepare.shards import SCHEMA
from tests.pipelines.images.field_files import scene

SHARD_ROWS, PER_GROUP = (30, 23), 8


def contents_of(zoo: list) -> list[bytes]:
    whole = [animal.content for animal in zoo if not animal.reason]
    return [whole[i % len(whole)] for i in range(sum(SHARD_ROWS))]


def write_dataset(
    folder: Path, contents: list[bytes], orientations: list[int], offsets: list[list[int] | None] | None = None
) -> Manifest:
    shards, first_id = [], 0
    for number, rows in enumerate(SHARD_ROWS):
        ids = range(first_id, first_id + rows)
        headers = [inspect(contents[i]) if contents[i] else None for i in ids]
        columns = {
            "image": [contents[i] for i in ids],
            "label": [i % 5 for i in ids],
            "height_px": [header.height_px if header else 9 for header in headers],
            "width_px": [header.width_px if header else 9 for header in headers],
            "orientation": [orientations[i] for i in ids],
            "segment_offsets": [offsets[i] if offsets else None for i in ids],
            "source": [str(i) for i in ids],
        }
        path = f"train/part-{number:05d}.parquet"
        (folder / "train").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, SCHEMA), folder / path, row_group_size=PER_GROUP)
        shards.append(
            Shard(path=path, num_rows=rows, num_bytes=1, first_id=first_id, sha256="", rows_per_group=PER_GROUP)
        )
        first_id += rows
    return Manifest(
        channels=3, image_px=None, classes=[], splits={"train": Split(num_rows=first_id, num_bytes=1, shards=shards)},
        num_found=first_id, num_ok=first_id, num_quarantined=0, num_duplicates=0, quarantine_reasons={},
        mean=[0.5], std=[0.5], config={}, source_digest="",
    )  # fmt: skip


@pytest.fixture
def make_segment(zoo: list, tmp_path: Path) -> Callable[..., FeedSegment]:
    contents = contents_of(zoo)
    manifest = write_dataset(tmp_path, contents, [inspect(content).orientation for content in contents])

    def make(
        train: bool = True, augment: AugmentConfig | None = None, channels: int = 3, **numbers: int
    ) -> FeedSegment:
        settings: dict[str, Any] = {"batch": 12, "micro_batch": 4, "num_workers": 2, "window": 24, **numbers}
        first_step = settings.pop("first_step", 0)
        plan = EpochPlan(index=Index.from_manifest(manifest, "train"), seed=5, shuffle=train, **settings)
        return FeedSegment(
            dataset_uri=str(tmp_path),
            plan=plan,
            transform=Transform(
                train=train, image_px=(16, 20), channels=channels, augment=augment or AugmentConfig(), seed=9
            ),
            first_step=first_step,
            last_step=2 * plan.steps_per_epoch,
        )

    return make


def all_of(segment: FeedSegment) -> Iterator[MicroBatch]:
    for window in range(segment.first_window, segment.first_window + segment.num_windows):
        yield from window_micro_batches(segment, window)


def test_micro_batches_are_the_plans_and_placeholders_count_for_nothing(make_segment: Callable) -> None:
    segment = make_segment()
    plan, batches = segment.plan, list(all_of(segment))
    expected = [(step, i) for step in range(segment.last_step) for i in range(plan.micro_batches_per_step)]
    assert [(batch.step, batch.index) for batch in batches] == expected
    for step in range(segment.last_step):
        ids = torch.cat([batch.ids for batch in batches if batch.step == step])
        np.testing.assert_array_equal(ids, plan.step_ids(step))
        assert sum(float(batch.weights.sum()) for batch in batches if batch.step == step) == plan.planned(step)
    for batch in batches:
        placeholder = batch.ids == PLACEHOLDER
        assert torch.equal(batch.weights == 0, placeholder)
        assert not batch.images[placeholder].any()
        assert torch.equal(batch.labels, torch.where(placeholder, -1, batch.ids % 5))


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "crops"), [(1, 1), (3, 1), (3, 3)])
def test_training_pixels_are_the_keyed_crops_of_the_stored_image(
    make_segment: Callable, zoo: list, channels: int, crops: int
) -> None:
    segment = make_segment(channels=channels)
    segment = dataclasses.replace(segment, transform=dataclasses.replace(segment.transform, crops=crops))
    contents, config = contents_of(zoo), segment.transform.augment
    for batch in all_of(segment):
        epoch = batch.step // segment.plan.steps_per_epoch
        assert len(batch.images) == crops * len(batch.ids)
        for row, image in enumerate(batch.images.numpy()):
            view, place = divmod(row, len(batch.ids))
            sample = int(batch.ids[place])
            if sample == PLACEHOLDER:
                continue
            pixels = decode(contents[sample], channels)
            key: dict[str, Any] = {"seed": 9, "epoch": epoch, "sample_ids": np.array([sample]), "view": view}
            sizes: dict[str, Any] = {
                "heights_px": np.array([pixels.shape[0]]),
                "widths_px": np.array([pixels.shape[1]]),
            }
            box, flip = crop_boxes(config, **key, **sizes)[0], flips(config, **key)[0]
            expected = np.empty((16, 20, channels), np.uint8)
            crop_into(expected, pixels, tuple(box.tolist()), bool(flip), Scratch())
            np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("by", ["set", "image"])
@pytest.mark.parametrize("train", [True, False])
def test_values_are_cropped_and_turned_as_they_are_keyed(tmp_path: Path, by: Any, train: bool) -> None:
    """Sixteen bits of two channels become float32 from 0 to 1, by the range of the set or of each image."""
    images = [scene(2, seed, side_px=40) for seed in range(sum(SHARD_ROWS))]
    own = ValueRange(dtype="uint16", kind="percentiles", by="image", percentiles=(2.0, 98.0))
    of_set = ValueRange(dtype="uint16", kind="window", low=(1000.0, 0.0), high=(60000.0, 65535.0))
    values_range = of_set if by == "set" else own
    contents = [pack(values, limits_of(values, own) if by == "image" else None) for values in images]
    manifest = write_dataset(tmp_path, contents, [1] * len(contents))
    augment = AugmentConfig(flip_vertical=True, quarter_turns=True)
    plan = EpochPlan(
        index=Index.from_manifest(manifest, "train"),
        seed=5,
        shuffle=train,
        batch=12,
        micro_batch=4,
        num_workers=2,
        window=24,
    )
    transform = Transform(
        train=train,
        image_px=(16, 16),
        channels=2,
        augment=augment,
        seed=9,
        crops=2 if train else 1,
        values=values_range,
    )
    segment = FeedSegment(
        dataset_uri=str(tmp_path), plan=plan, transform=transform, first_step=0, last_step=plan.steps_per_epoch
    )
    seen = 0
    for batch in all_of(segment):
        assert batch.images.dtype == torch.float32
        for row, image in enumerate(batch.images.numpy()):
            view, place = divmod(row, len(batch.ids))
            sample = int(batch.ids[place])
            if sample == PLACEHOLDER:
                assert not image.any()
                continue
            seen += 1
            limits = limits_of(images[sample], values_range)
            if not train:
                np.testing.assert_array_equal(image, evaluation_view(to_unit(images[sample], *limits), (16, 16)))
                continue
            key: dict[str, Any] = {"seed": 9, "epoch": 0, "sample_ids": np.array([sample]), "view": view}
            side = np.array([40])
            box = crop_boxes(augment, **key, heights_px=side, widths_px=side)[0]
            expected = np.empty((16, 16, 2), np.float32)
            flip = bool(flips(augment, **key)[0])
            crop_values_into(expected, contents[sample], limits, tuple(box.tolist()), flip, Scratch())
            upside_down, quarters = turns(augment, **key)
            expected = expected[::-1] if upside_down[0] else expected
            np.testing.assert_array_equal(image, np.rot90(expected, int(quarters[0])))
    assert seen == len(images) * (2 if train else 1)


def test_evaluation_sees_every_image_as_it_is(make_segment: Callable, zoo: list) -> None:
    segment, contents = make_segment(train=False), contents_of(zoo)
    seen = []
    for batch in all_of(segment):
        for image, sample in zip(batch.images.numpy(), batch.ids.tolist()):
            if sample != PLACEHOLDER:
                seen.append(sample)
                np.testing.assert_array_equal(image, evaluation_view(decode(contents[sample], 3), (16, 20)))
    assert seen == 2 * list(range(sum(SHARD_ROWS)))


@pytest.mark.parametrize("first_step", [1, 4, 7, 9])
def test_a_later_start_yields_the_same_tail(make_segment: Callable, first_step: int) -> None:
    expected = [batch for batch in all_of(make_segment()) if batch.step >= first_step]
    found = list(all_of(make_segment(first_step=first_step)))
    assert_same(found, expected)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_no_sample(make_segment: Callable, num_workers: int) -> None:
    def real(batches: list[MicroBatch]) -> list[MicroBatch]:
        return [batch for batch in batches if bool((batch.ids != PLACEHOLDER).any())]

    other = list(all_of(make_segment(num_workers=num_workers)))
    assert_same(real(other), real(list(all_of(make_segment()))))


def test_a_sample_that_cannot_be_decoded_counts_for_nothing(
    zoo: list, tmp_path: Path, make_segment: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(all_of(make_segment()))
    contents = contents_of(zoo)
    contents[7] = b""
    write_dataset(tmp_path, contents, [inspect(content).orientation if content else 1 for content in contents])
    with caplog.at_level(logging.WARNING):
        found = list(all_of(make_segment()))
    assert "sample 7 could not be decoded and gets weight 0" in caplog.text
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.ids, other.ids)
        spoilt = batch.ids == 7
        assert torch.equal(batch.weights, torch.where(spoilt, 0, other.weights))
        assert torch.equal(batch.images[~spoilt], other.images[~spoilt])
        assert not batch.images[spoilt].any()


@pytest.mark.parametrize(("height_px", "width_px"), [(0, 9), (9, 0), (-3, 9), (10**6, 10**6)])
def test_a_row_that_says_a_wrong_size_counts_for_nothing_and_ends_nothing(
    zoo: list, tmp_path: Path, make_segment: Callable, height_px: int, width_px: int
) -> None:
    segment, path = make_segment(), tmp_path / "train/part-00000.parquet"
    table = pq.read_table(path)
    for name, value in (("height_px", height_px), ("width_px", width_px)):
        sizes = table[name].to_pylist()
        sizes[3] = value
        place = table.schema.get_field_index(name)
        table = table.set_column(place, SCHEMA.field(name), pa.array(sizes, SCHEMA.field(name).type))
    pq.write_table(table.cast(SCHEMA), path, row_group_size=PER_GROUP)
    weights = {int(i): w for b in all_of(segment) for i, w in zip(b.ids, b.weights.tolist()) if i != PLACEHOLDER}
    assert weights.pop(3) == 0
    assert set(weights.values()) == {1}


@pytest.mark.parametrize("kind", ["indexed", "restarts"])
def test_sliceable_images_give_the_same_views_and_wrong_offsets_count_for_nothing(
    zoo: list, tmp_path: Path, make_segment: Callable, kind: str
) -> None:
    expected = list(all_of(make_segment()))
    orientations = [inspect(content).orientation for content in contents_of(zoo)]
    stored = []
    for content, orientation in zip(contents_of(zoo), orientations):
        # Small files would grow by more than is allowed, so they are cut without that limit; turned ones are not cut,
        # since write_dataset takes their sizes from their EXIF.
        try:
            jpeg = read_header(content)
            transcode = indexed if kind == "indexed" else rewritten
            found = transcode(content, jpeg, read_scan(content, jpeg), 1) if orientation == 1 else None
        except ValueError:
            found = None
        stored.append((content, None) if found is None else (found[0], np.array(found[1]).tolist()))
    contents, offsets = [content for content, _ in stored], [found for _, found in stored]
    assert sum(found is not None for found in offsets) >= 4
    write_dataset(tmp_path, contents, orientations, offsets)
    assert_same(list(all_of(make_segment())), expected)
    crafted = next(i for i, found in enumerate(offsets) if found is not None)
    offsets[crafted] = [0, 5, 2**31 - 1]
    write_dataset(tmp_path, contents, orientations, offsets)
    for batch, other in zip(all_of(make_segment()), expected, strict=True):
        assert torch.equal(batch.weights, torch.where(batch.ids == crafted, 0, other.weights))


def test_augmentation_is_the_same_in_any_batch_and_differs_between_epochs(make_segment: Callable) -> None:
    augment = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", scale=(0.5, 1.0))
    by_key: dict[tuple[int, int], torch.Tensor] = {}
    for numbers in ({"batch": 12, "micro_batch": 4}, {"batch": 15, "micro_batch": 5}):
        segment = make_segment(augment=augment, **numbers)
        for batch in all_of(segment):
            epoch = batch.step // segment.plan.steps_per_epoch
            for image, sample in zip(batch.images, batch.ids.tolist()):
                if sample != PLACEHOLDER:
                    assert torch.equal(by_key.setdefault((epoch, sample), image), image)
    samples = range(sum(SHARD_ROWS))
    assert sum(torch.equal(by_key[0, i], by_key[1, i]) for i in samples) <= 2


def test_without_a_crop_training_sees_the_evaluation_view_or_its_mirror(make_segment: Callable, zoo: list) -> None:
    contents, mirrored = contents_of(zoo), set()
    for batch in all_of(make_segment(augment=AugmentConfig(crop="none"))):
        for image, sample in zip(batch.images.numpy(), batch.ids.tolist()):
            if sample != PLACEHOLDER:
                view = evaluation_view(decode(contents[sample], 3), (16, 20))
                flipped = not np.array_equal(image, view)
                mirrored.add(flipped)
                np.testing.assert_array_equal(image, view[:, ::-1] if flipped else view)
    assert mirrored == {False, True}


def test_a_subset_feeds_only_its_samples(make_segment: Callable) -> None:
    segment = make_segment()
    index = segment.plan.index.only(np.array([3, 17, 40]))
    plan = dataclasses.replace(segment.plan, index=index)
    subset = dataclasses.replace(segment, plan=plan, last_step=plan.steps_per_epoch)
    ids = torch.cat([batch.ids for batch in all_of(subset)])
    assert sorted(ids[ids != PLACEHOLDER].tolist()) == [3, 17, 40]


def assert_same(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    for batch, other in zip(found, expected, strict=True):
        assert (batch.step, batch.index) == (other.step, other.index)
        for name in ("images", "ids", "labels", "weights"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


@pytest.mark.parametrize("values", [[], [b""], [b"", b""], [b"ab", b"", b"cde"]])
def test_values_of_a_column_are_what_pyarrow_sees(values: list[bytes]) -> None:
    column = pa.array([b"xyz", *values, b"z"], pa.binary())
    for chunk in (column, column.slice(1, len(values)), pa.array(values, pa.binary())):
        assert [bytes(value) for value in _values(chunk)] == chunk.to_pylist()
