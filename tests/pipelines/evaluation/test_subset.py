"""The images of an evaluation while pretraining: always the same, as many of each class, no image twice."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest
from pipelines.evaluation.subset import Subset, choose_subset
from pipelines.feed.plan import Ids, Index
from pipelines.storage import open_storage

NUM_TRAIN = 40
"""Of the fixture's tiles, with ids from 0 on; 20 of val follow. Tile i has label i % 2."""


def chosen(dataset: tuple[str, Manifest], num_images: int, seed: int = 0, **changes: Any) -> Subset:
    uri, manifest = dataset
    return choose_subset(dataclasses.replace(manifest, **changes), open_storage(uri), num_images, seed=seed)


def ids_of(index: Index | None) -> Ids:
    assert index is not None
    assert index.selected is not None
    return index.selected


def without_val(dataset: tuple[str, Manifest]) -> dict[str, Any]:
    return {"splits": {"train": dataset[1].splits["train"]}}


def test_a_seed_chooses_the_same_images_again_and_another_seed_others(tiles: tuple[str, Manifest]) -> None:
    one, again, other = (chosen(tiles, 10, seed) for seed in (3, 3, 4))
    assert ids_of(one.fitted).tolist() == ids_of(again.fitted).tolist()
    assert ids_of(one.held_out).tolist() == ids_of(again.held_out).tolist()
    assert ids_of(one.fitted).tolist() != ids_of(other.fitted).tolist()


def test_classes_have_equal_shares_and_held_out_images_are_of_val(tiles: tuple[str, Manifest]) -> None:
    found = chosen(tiles, 11)
    assert found.held_out_split == "val"
    for index in (found.fitted, found.held_out):
        assert np.bincount(ids_of(index) % 2).tolist() == [5, 5]
    assert ids_of(found.fitted).max() < NUM_TRAIN <= ids_of(found.held_out).min()


@pytest.mark.parametrize("num_images", [4, 20, 30, 1000])
def test_without_val_other_training_images_are_held_out(tiles: tuple[str, Manifest], num_images: int) -> None:
    found = chosen(tiles, num_images, **without_val(tiles))
    fitted, held_out = ids_of(found.fitted), ids_of(found.held_out)
    assert found.held_out_split == "train"
    assert not set(fitted) & set(held_out)
    per_class = min(num_images // 2, NUM_TRAIN // 4)
    assert np.bincount(fitted % 2).tolist() == np.bincount(held_out % 2).tolist() == [per_class] * 2


def test_a_class_with_fewer_images_gives_all_that_it_has(tiles: tuple[str, Manifest]) -> None:
    found = chosen(tiles, 1000)
    assert (len(ids_of(found.fitted)), len(ids_of(found.held_out))) == (40, 20)


def test_no_more_row_groups_are_read_than_hold_the_images(tiles: tuple[str, Manifest]) -> None:
    """A row group has eight rows, four of each class."""
    found = chosen(tiles, 16)
    assert len(set(ids_of(found.fitted) // 8)) == 2
    assert len(set((ids_of(found.held_out) - NUM_TRAIN) // 8)) <= 3


def test_with_several_classes_an_image_there_are_training_images_alone(tiles: tuple[str, Manifest]) -> None:
    found = chosen(tiles, 10, label_sets=[[0], [0, 1]])
    assert (len(ids_of(found.fitted)), found.held_out) == (10, None)


def test_without_labels_there_are_training_images_alone(tiles: tuple[str, Manifest]) -> None:
    found = chosen(tiles, 12, classes=[])
    assert (found.held_out, found.held_out_split) == (None, "")
    assert len(ids_of(found.fitted)) == 12
    assert ids_of(found.fitted).tolist() != list(range(12))


def test_fewer_images_than_classes_are_refused(tiles: tuple[str, Manifest]) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.images 2 is below one for each of the 3 classes; try 30"):
        chosen(tiles, 2, classes=["a", "b", "c"])
