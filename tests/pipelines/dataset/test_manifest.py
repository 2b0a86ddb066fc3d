"""A manifest is the dataset's identity: what was changed, cut short or made by another version is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from mae_core.errors import UserError
from mae_core.normalization import Normalization, ValueRange
from pipelines.dataset.manifest import (
    MANIFEST,
    Manifest,
    PixelValues,
    Shard,
    Split,
    check_value_range,
    is_prepared,
    read_manifest,
    write_manifest,
)
from pipelines.storage import open_storage

SHARD = Shard(path="train/part-00000.parquet", num_rows=7, num_bytes=9, first_id=0, sha256="ab", rows_per_group=3)
MADE = Manifest(
    channels=1,
    image_px=(28, 28),
    classes=["a", "b"],
    splits={"train": Split(num_rows=7, num_bytes=9, shards=[SHARD])},
    num_found=8,
    num_ok=7,
    num_quarantined=1,
    num_duplicates=0,
    quarantine_reasons={"empty file": 1},
    mean=[0.1],
    std=[0.2],
    config={"seed": 0},
    source_digest="cd",
)

VALUES = PixelValues(
    range=ValueRange(dtype="uint16", kind="window", low=(0.0,), high=(4096.0,)),
    minimum=[3.0],
    maximum=[4095.0],
    percentiles={"50": [2000.0]},
)


def test_what_is_read_equals_what_was_written(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert not is_prepared(storage)
    written = write_manifest(storage, MADE)
    assert is_prepared(storage)
    assert read_manifest(storage) == written
    assert written.digest == MADE.computed_digest()
    assert len(written.digest) == 64


def test_notes_are_not_part_of_the_digest_and_leave_no_trace_where_there_are_none(tmp_path: Path) -> None:
    noted = MADE.noting({"no image (*.txt)": 3}, ["column:x"])
    assert noted.num_found == MADE.num_found + 3
    assert noted.noting({"documents": 1}, []).num_found == MADE.num_found + 1
    noted = dataclasses.replace(noted, num_unlabelled={"train": 1})
    assert noted.computed_digest() == MADE.computed_digest()
    assert read_manifest_of(tmp_path / "noted", noted) == noted.sealed()
    assert set(MADE.to_dict()) == set(noted.to_dict()) - {"passed_over", "label_candidates", "num_unlabelled"}


def read_manifest_of(folder: Path, manifest: Manifest) -> Manifest:
    write_manifest(open_storage(folder), manifest)
    return read_manifest(open_storage(folder))


NOTES = {
    "notes": {"overviews left out": 2}, "passed_over": {"documents": 1}, "label_candidates": ["json:class"],
    "num_unlabelled": {"train": 1},
}  # fmt: skip


def test_the_digest_covers_every_other_field_but_notes() -> None:
    others = {
        "channels": 3, "image_px": None, "classes": ["a"], "splits": {}, "num_found": 9, "num_ok": 8,
        "num_quarantined": 2, "num_duplicates": 1, "quarantine_reasons": {}, "mean": [0.3], "std": [0.3],
        "config": {}, "source_digest": "", "values": VALUES, "schema": 2, "label_sets": [[0, 1]],
    }  # fmt: skip
    assert {*others, *NOTES} == {field.name for field in dataclasses.fields(Manifest)} - {"digest"}
    digests = {dataclasses.replace(MADE, **{name: value}).computed_digest() for name, value in others.items()}
    assert len(digests | {MADE.computed_digest()}) == len(others) + 1
    noted = {name: value for name, value in NOTES.items() if name != "passed_over"}
    assert dataclasses.replace(MADE, **noted).computed_digest() == MADE.computed_digest()
    assert MADE.noting({"documents": 1}, []).computed_digest() == MADE.computed_digest()


def test_values_and_notes_say_something_or_are_not_there(tmp_path: Path) -> None:
    """A dataset of plain pixels keeps the digest that earlier versions gave it."""
    assert not {"values", "label_sets", *NOTES} & set(MADE.to_dict())
    storage = open_storage(tmp_path)
    written = write_manifest(storage, dataclasses.replace(MADE, values=VALUES, notes={"a": 1}, schema=2))
    assert read_manifest(storage) == written


def test_a_model_reads_the_values_that_it_was_trained_on() -> None:
    plain, other = Normalization(mean=(0.5,), std=(0.2,)), ValueRange(dtype="int16", kind="full")
    by_image = ValueRange(dtype="uint16", kind="percentiles", by="image", percentiles=(1.0, 99.0))
    deep = dataclasses.replace(MADE, values=VALUES)
    check_value_range("d", MADE, plain, "m")
    check_value_range("d", deep, dataclasses.replace(plain, values=VALUES.range), "m")
    for manifest, values, message in (
        (deep, None, r"d has uint16 values .* but m was trained on 8-bit pixels"),
        (MADE, other, r"d has 8-bit pixels but m was trained on int16 values"),
        (deep, other, r"prepare the dataset anew from files of that kind"),
        (deep, by_image, r"range percentiles 1 99 by image; prepare the dataset anew with that --range and --range-by"),
    ):
        with pytest.raises(UserError, match=message):
            check_value_range("d", manifest, dataclasses.replace(plain, values=values), "m")


def test_a_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a prepared dataset .*; run `mae prepare SOURCE"):
        read_manifest(open_storage(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace('"num_ok": 7', '"num_ok": "many"'), "damaged"),
        (lambda text: text.replace('"num_ok": 7', '"num_ok": 6'), "was changed after it was written"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "has schema 99, this version reads 1"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(tmp_path: Path, change, words: str) -> None:
    storage = open_storage(tmp_path)
    write_manifest(storage, MADE)
    storage.write(MANIFEST, change(storage.read(MANIFEST).decode()).encode())
    with pytest.raises(ValueError, match=words):
        read_manifest(storage)


def test_a_manifest_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    write_manifest(open_storage(tmp_path), MADE)
    text = (tmp_path / MANIFEST).read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["splits"]["train"]["shards"][0]["num_rows"] == 7


def test_row_groups_are_counted_with_the_short_one() -> None:
    assert SHARD.num_groups == 3


def test_a_missing_split_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no split 'val', only train"):
        MADE.split("val")
