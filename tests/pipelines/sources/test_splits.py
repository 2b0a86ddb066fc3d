"""The same words name the splits of every kind of source; nothing of a test split lands in training without a word."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.sources.splits import splits_by_name
from tests.pipelines.sources.packing import fill, pack, table

Png = Callable[[int], bytes]
WORDS = {
    "train": "train", "TRAIN": "train", "Training": "train", "val": "val", "Valid": "val", "validation": "val",
    "dev": "val", "Dev": "val", "test": "test", "TESTING": "test", "testing": "test",
}  # fmt: skip


@pytest.mark.parametrize(("word", "split"), WORDS.items())
@pytest.mark.parametrize("kind", ["folder", "tar of folders", "tar", "tar in folder", "Parquet", "column", "list"])
def test_a_word_names_the_split_in_every_kind_of_source(
    word: str, split: str, kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    other = "train" if split == "test" else "test"
    for number, name in enumerate((word, other)):
        image = png(number)
        if kind == "folder":
            fill(tmp_path / "s", {f"{name}/a/{number}.png": image})
        elif kind == "tar of folders":
            pack(tmp_path / f"s/{number}.tar", [(f"{name}/a/{number}.png", image)])
        elif kind == "tar":
            pack(tmp_path / f"s/set-{name}-00000{number}.tar", [(f"{number}.png", image)])
        elif kind == "tar in folder":
            pack(tmp_path / f"s/{name}/{number}.tar", [(f"{number}.png", image)])
        elif kind == "Parquet":
            table(tmp_path / f"s/data/{name}-00000-of-00001.parquet", {"image": [image]})
    if kind == "column":
        table(tmp_path / "s/a.parquet", {"image": [png(0), png(1)], "split": [word, other]})
    source = tmp_path / "s"
    if kind == "list":
        source = fill(
            source, {"0.png": png(0), "1.png": png(1), "l.csv": f"uri,split\n0.png,{word}\n1.png,{other}\n".encode()}
        )
        source /= "l.csv"
    _, rows = prepared(source)
    assert {name: [row["image"] for row in found] for name, found in rows.items()} == {split: [png(0)], other: [png(1)]}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["train-00000-of-00002.parquet", "test-00000-of-00001-0a1b2c3d4e5f.parquet"], ["train", "test"]),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"], ["train", "test"]),
        (["train_images_0.tar", "test_images_0.tar"], ["train", "test"]),
        (["imagenet1k-train-{0000..1023}.tar", "imagenet1k-validation-00.tar"], ["train", "val"]),
        (["latest-0.tar", "contest.tar", "attrain.tar"], ["", "", ""]),
        (["test-tube-0.tar", "test-tube-1.tar"], ["", ""]),
        (["a.tar", "test.tar"], ["", "test"]),
        (["train2017.tar", "val2017.tar"], ["train", "val"]),
        (["split=train/0.parquet", "split=test/0.parquet"], ["train", "test"]),
    ],
)
def test_a_file_names_its_split_with_its_last_word(paths: list[str], expected: list[str]) -> None:
    assert splits_by_name(paths, "s") == {path: split for path, split in zip(paths, expected) if split}


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["test-tube-0.tar", "beaker-0.tar"], "test-tube-0.tar of s may be of split test or only have the word"),
        (["train-0.tar", "test-clean-0.tar", "x.tar"], "test-clean-0.tar of s may be of split test"),
        (["images.tar", "testset.tar"], "testset.tar of s may be of split test"),
        (["test/train-0.tar"], "names the splits test and train; rename it"),
    ],
)
def test_a_file_that_may_be_of_a_split_is_refused_by_name(paths: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        splits_by_name(paths, "s")


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a/0.png", "holdout/a/1.png"], r"has train/ and also 1 images outside them, such as .*holdout/a/1.png"),
        (["Train/a/0.png", "val/a/1.png", "a/2.png"], r"has train/, val/ and also 1 images outside .*a/2.png"),
        (["data/train/0.png", "data/test/1.png"], r"is in a folder test/, but not at the top.*prepare data by itself"),
        (["bottle/train/0.png", "bottle/Validation/1.png"], "is in a folder Validation/, but not at the top"),
        (["train/a/test/0.png", "train/a/1.png"], "is in a folder test/, but not at the top"),
    ],
)
def test_a_folder_that_may_be_a_split_is_refused_by_name(
    kind: str, names: list[str], words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    contents = {name: png(i) for i, name in enumerate(names)}
    source = fill(tmp_path / "s", contents) if kind == "folder" else pack(tmp_path / "s/a.tar", contents.items())
    with pytest.raises(ValueError, match=words):
        prepared(source)


@pytest.mark.parametrize("names", [["train2017", "test2017"], ["training_set", "test_set"], ["test_images", "cats"]])
def test_a_folder_like_a_split_is_a_class_only_if_asked_for(
    names: list[str], png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = fill(tmp_path / "s", {f"{name}/{i}.png": png(i) for i, name in enumerate(names)})
    for labels in ("auto", "none"):
        with pytest.raises(ValueError, match=r"has a folder \w+/, which is no split and looks like one; name it"):
            prepared(source, labels=labels)
    assert prepared(source, labels="folder")[0].classes == sorted(names)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_class_called_test_tube_is_a_class(kind: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    names = ["test-tube/0.png", "beaker/1.png", "train_station/2.png", "validator/3.png"]
    contents = {name: png(i) for i, name in enumerate(names)}
    source = fill(tmp_path / "s", contents) if kind == "folder" else pack(tmp_path / "s/a.tar", contents.items())
    manifest, rows = prepared(source)
    assert manifest.classes == ["beaker", "test-tube", "train_station", "validator"]
    assert set(rows) == {"train"}


def test_a_list_without_splits_has_those_of_the_folders(png: Png, prepared: Callable, tmp_path: Path) -> None:
    names = ["train/a.png", "Testing/b.png", "dev/c.png"]
    source = fill(tmp_path / "s", {name: png(i) for i, name in enumerate(names)})
    fill(source, {"l.csv": "\n".join(["uri", *names]).encode()})
    _, rows = prepared(source / "l.csv")
    assert {split: [row["source"] for row in found] for split, found in rows.items()} == {
        "train": [names[0]], "test": [names[1]], "val": [names[2]]
    }  # fmt: skip
    fill(source, {"l.csv": "\n".join(["uri", *(str(source / name) for name in names)]).encode()})
    with pytest.raises(
        ValueError, match=r"has no column of splits, and names .*Testing/b.png and .*add a column split"
    ):
        prepared(source / "l.csv", out="again")
    fill(source, {"l.csv": f"uri\n{source / names[1]}\n".encode()})
    assert prepared(source / "l.csv", out="one")[0].num_ok == 1


def test_a_tar_whose_name_and_folders_disagree_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = pack(tmp_path / "s/train-0.tar", [("test/a/0.png", png(0)), ("train/a/1.png", png(1))])
    with pytest.raises(
        ValueError, match=r"train-0.tar of .* is of split train by its name, and its test/a/0.png of test"
    ):
        prepared(source)


def test_a_column_of_splits_can_be_named_and_must_agree(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"image": [png(0), png(1)], "fold": ["Train", "Testing"], "split": ["a", "b"]}
    source = table(tmp_path / "s/a.parquet", columns)
    with pytest.raises(ValueError, match=r"column split of .* has 'a', which is no split; .*--split-column"):
        prepared(source)
    assert set(prepared(source, split_column="fold")[1]) == {"train", "test"}
    with pytest.raises(ValueError, match=r"has no column 'part'; its columns are image, fold, split"):
        prepared(source, split_column="part")
    other = table(tmp_path / "t/train-0.parquet", {"image": [png(0)], "split": ["test"]})
    with pytest.raises(ValueError, match=r"is of split train by its name, and its column split has 'test'"):
        prepared(other)
