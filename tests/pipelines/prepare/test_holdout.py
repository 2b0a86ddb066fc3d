"""No patient is in two splits, and every class that can be is held out in part."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.prepare.holdout import chosen_groups
from tests.pipelines.sources.packing import fill, table

Png = Callable[[int], bytes]

groups = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.dictionaries(st.sampled_from("xyz"), st.integers(1, 30), min_size=1, max_size=2).map(Counter),
    min_size=1,
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(groups, st.floats(0.01, 0.5), st.integers(0, 5))
def test_each_class_keeps_images_to_train_on_and_one_with_groups_of_its_own_is_held_out(
    found: dict[str, Counter[str]], fraction: float, seed: int
) -> None:
    chosen = chosen_groups(found, fraction, seed)
    assert chosen == chosen_groups(dict(reversed(found.items())), fraction, seed)
    held = sum((found[name] for name in chosen), Counter())
    total = sum(found.values(), Counter())
    assert all(held[label] < count for label, count in total.items())
    for label in total:
        alone = [name for name, counts in found.items() if set(counts) == {label}]
        if len(alone) >= 2 or (alone and len([name for name in found if label in found[name]]) > len(alone)):
            assert held[label], f"{label} could be held out"


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_single_images_are_held_out_in_the_share_of_each_class(fraction: float) -> None:
    found = {f"{label}/{i}": Counter({label: 1}) for label, count in (("a", 40), ("b", 200)) for i in range(count)}
    held = Counter(name[0] for name in chosen_groups(found, fraction, 0))
    assert held == {"a": 40 * fraction, "b": 200 * fraction}
    assert chosen_groups(found, fraction, 0) != chosen_groups(found, fraction, 1)
    assert chosen_groups(found, 0, 0) == frozenset()


def patients(folder: Path, png: Png, per_patient: int = 5) -> Path:
    """Write two patients of each of two classes."""
    names = [f"{label}/p{2 * n + i}_{k}.png" for n, label in enumerate(("ill", "well")) for i in (0, 1)
             for k in range(per_patient)]  # fmt: skip
    return fill(folder, {name: png(number) for number, name in enumerate(names)})


def splits_of(rows: dict[str, list[dict]], group: Callable[[str], str]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for split, some in rows.items():
        for row in some:
            found[group(row["source"])].add(split)
    return dict(found)


def test_all_images_of_a_patient_are_in_one_split_and_every_class_in_both(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = patients(tmp_path / "s", png)
    manifest, rows = prepared(source, group_by=r"(p\d+)_", val_fraction=0.1)
    found = splits_of(rows, lambda name: name.split("/")[1].split("_")[0])
    assert all(len(splits) == 1 for splits in found.values())
    assert sorted(split for splits in found.values() for split in splits) == ["train", "train", "val", "val"]
    assert all({row["label"] for row in some} == {0, 1} for some in rows.values())
    again, _ = prepared(source, out="again", group_by=r"(p\d+)_", val_fraction=0.1)
    assert again.digest == manifest.digest
    assert prepared(source, out="seed", group_by=r"(p\d+)_", val_fraction=0.1, seed=3)[0].digest != manifest.digest


def test_a_group_can_be_a_column(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {
        "image": [png(i) for i in range(12)],
        "label": [i // 6 for i in range(12)],
        "patient": [i // 3 for i in range(12)],
    }
    source = table(tmp_path / "s/a.parquet", columns)
    _, rows = prepared(source, group_by="column:patient", val_fraction=0.2)
    found = splits_of(rows, lambda name: str(int(name[-9:]) // 3))
    assert all(len(splits) == 1 for splits in found.values())
    assert {row["label"] for row in rows["val"]} == {0, 1}
    lines = "\n".join(f"{i}.png,{i // 6},P{i // 3}" for i in range(12))
    listed = fill(
        tmp_path / "l", {f"{i}.png": png(i) for i in range(12)} | {"l.csv": f"uri,label,Patient\n{lines}".encode()}
    )
    _, rows = prepared(listed / "l.csv", out="list", group_by="column:patient", val_fraction=0.2)
    found = splits_of(rows, lambda name: str(int(name.split(".")[0]) // 3))
    assert all(len(splits) == 1 for splits in found.values())
    assert len(rows["val"]) == 6


def test_a_patient_is_one_group_whether_a_file_has_integers_or_floats(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    """A column of integers is one of floats in a file of pandas where a field is missing."""
    for name, start, patients in (("a", 0, [0, 1, 2, 3]), ("b", 4, [0.0, 1.0, 2.0, 3.0])):
        images = [png(start + i) for i in range(4)]
        table(tmp_path / f"s/{name}.parquet", {"image": images, "label": [0, 0, 1, 1], "patient": patients})
    _, rows = prepared(tmp_path / "s", group_by="column:patient", val_fraction=0.5)
    found = splits_of(rows, lambda name: str(int(name[-9:])))
    assert len(found) == 4
    assert all(len(splits) == 1 for splits in found.values())
    assert rows["val"]


@pytest.mark.parametrize("listed", [False, True], ids=["images", "list"])
@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("patient", [1.0, math.nan], "has no group by --group-by column:patient"),
        ("patient", ["p1", " "], "has no group by --group-by column:patient"),
        ("patient", [["p1"], ["p2"]], "has a list as its group; name a column of texts or numbers"),
        ("person", ["p1", "p2"], "has no column 'person' to group by, but .*patient"),
    ],
)
def test_fields_that_name_no_group_are_refused(
    column: str, values: list[Any], words: str, listed: bool, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = {"uri": ["0.png", "1.png"]} if listed else {"image": [png(0), png(1)]}
    table(tmp_path / "s/l.parquet", images | {"label": [0, 1], "patient": values})
    fill(tmp_path / "s", {f"{i}.png": png(i) for i in range(2)} if listed else {})
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "s/l.parquet", group_by=f"column:{column}")


@pytest.mark.parametrize(
    ("group_by", "words"),
    [
        (r"(q\d+)", r"has no group by --group-by \(q\\d\+\); give an expression"),
        ("(", r"group_by '\(' is no regular expression"),
        ("column:patient", "is for tables and lists, and .* is a folder of images; give a regular expression"),
    ],
)
def test_groups_that_cannot_be_found_are_refused(
    group_by: str, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        prepared(patients(tmp_path / "s", png), group_by=group_by)


def test_a_patient_in_two_splits_of_the_source_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    names = ["train/a/p1_0.png", "train/b/p2_0.png", "test/a/p1_1.png"]
    source = fill(tmp_path / "s", {name: png(i) for i, name in enumerate(names)})
    with pytest.raises(ValueError, match=r"group p1 has images in (train and in test|test and in train)"):
        prepared(source, group_by=r"(p\d)_", val_fraction=0.1)


def test_of_ten_images_one_is_held_out_or_it_is_said_how(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fill(tmp_path / "s", {f"{c}/{i}.png": png(i + 10 * ord(c)) for c in "ab" for i in range(5)})
    seed = next(
        seed for seed in range(100) if "val" not in prepared(source, out=f"{seed}", val_fraction=0.1, seed=seed)[1]
    )
    assert "split val is empty: of 10 images" in caplog.text
    assert "--hold-out stratified" in caplog.text
    _, rows = prepared(source, out="stratified", val_fraction=0.1, seed=seed, hold_out="stratified")
    assert sorted(row["label"] for row in rows["val"]) == [0, 1]
    assert len(rows["train"]) == 8


def test_nothing_is_held_out_beside_a_val_folder(png: Png, prepared: Callable, tmp_path: Path) -> None:
    names = ["train/a/p1_0.png", "train/b/p2_0.png", "val/a/p3_1.png"]
    source = fill(tmp_path / "s", {name: png(i) for i, name in enumerate(names)})
    _, rows = prepared(source, group_by=r"(p\d)_", val_fraction=0.5)
    assert {split: len(some) for split, some in rows.items()} == {"train": 2, "val": 1}
