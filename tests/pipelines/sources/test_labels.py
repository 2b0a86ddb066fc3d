"""A label is what the source says, whatever type it is stored in; what is no class is refused or said."""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from mae_core.errors import UserError
from pipelines.config import InspectConfig
from pipelines.dataset.manifest import Manifest
from pipelines.prepare.inspect import inspect_uri
from tests.pipelines.sources.packing import fill, pack, structs, table

Png = Callable[[int], bytes]


def labels_of(manifest: Manifest, rows: dict[str, list[dict]], split: str = "train") -> dict[bytes, str | None]:
    """Return the class name of each image of a split."""
    named = {row["image"]: row["label"] for row in rows[split]}
    return {image: None if label is None else manifest.classes[label] for image, label in named.items()}


@pytest.mark.parametrize(
    ("column", "classes", "expected"),
    [
        (pa.array(pd.Categorical(["dog", "cat"] * 3)), ["cat", "dog"], ["dog", "cat"] * 3),
        (pa.array(pd.Categorical([3, 1] * 3)), ["0", "1", "2", "3"], ["3", "1"] * 3),
        (pa.array(["b", "a"] * 3).dictionary_encode(), ["a", "b"], ["b", "a"] * 3),
        (pa.array([0.0, 2.0, None] * 2), ["0", "1", "2"], ["0", "2", None] * 2),
        (pa.array([0.0, 2.0, float("nan")] * 2), ["0", "1", "2"], ["0", "2", None] * 2),
        (pa.array([Decimal("1"), Decimal("0")] * 3), ["0", "1"], ["1", "0"] * 3),
        (pa.array([True, False] * 3), ["False", "True"], ["True", "False"] * 3),
        (pa.array([True, None] * 3), ["True"], ["True", None] * 3),
        (pa.array(["x", None, ""] * 2), ["x"], ["x", None, None] * 2),
        (pa.array(["x", "y"] * 3, pa.large_string()), ["x", "y"], ["x", "y"] * 3),
        (pa.array([7, 0] * 3, pa.uint8()), [str(i) for i in range(8)], ["7", "0"] * 3),
        (pa.array([-1, 1] * 3), ["-1", "1"], ["-1", "1"] * 3),
        (pa.array([-1, 1, 0] * 2), ["0", "1"], [None, "1", "0"] * 2),
        (pa.array([-1, 2_000_000, 5] * 2), ["2000000", "5"], [None, "2000000", "5"] * 2),
        (pa.array(["-1", "cat", "dog"] * 2), ["cat", "dog"], [None, "cat", "dog"] * 2),
        (pa.array(["001", "010", "002"] * 2), ["001", "002", "010"], ["001", "010", "002"] * 2),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_column_of_any_type_gives_its_classes(
    column: pa.Array, classes: list[str], expected: list[str | None], png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = [png(i) for i in range(6)]
    manifest, rows = prepared(table(tmp_path / "s/train.parquet", {"image": structs(images), "label": column}))
    assert manifest.classes == classes
    assert labels_of(manifest, rows) == dict(zip(images, expected))
    num_missing = expected.count(None)
    assert manifest.num_unlabelled == ({"train": num_missing} if num_missing else {})


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (
            pa.array([[0, 1], [1]] * 3),
            "column label of .* has lists, but an image has one class unless .*--labels none",
        ),
        (pa.array([0.5, 1.0] * 3), "has label 0.5, but a class is a name or a whole number"),
        (pa.array([float("inf"), 1.0] * 3), "has label inf, but a class is a name or a whole number"),
        (pa.array([b"cat", b"dog"] * 3), "column label of .* is of type binary and holds no images: if it has classes"),
        (pa.array([{"a": 1}] * 6), r"column label of .* has struct<a: int64>, but an image has one class"),
        (pa.array([b"cat"] * 6, pa.binary(3)), "column label of .* has fixed_size_binary"),
    ],
)
def test_a_column_that_is_no_class_is_refused_with_a_way_out(
    column: pa.Array, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = [png(i) for i in range(6)]
    source = table(tmp_path / "s/train.parquet", {"image": structs(images), "label": column, "other": [1] * 6})
    with pytest.raises(ValueError, match=words):
        prepared(source)
    assert prepared(source, out="none", labels="none")[0].classes == []
    assert prepared(source, out="other", labels="column:other")[0].classes == ["0", "1"]


def test_the_tests_of_the_hub_with_minus_one_are_unlabelled_and_names_keep_their_order(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    names = {"label": ["tench", "goldfish", "great white shark"]}
    for word, first, labels in (("train", 0, [2, 0, 1]), ("validation", 10, [1, 1, 2]), ("test", 20, [-1] * 3)):
        images = [png(first + i) for i in range(3)]
        columns = {"image": structs(images), "label": labels}
        table(tmp_path / f"s/data/{word}-00000-of-00001.parquet", columns, names)
    manifest, rows = prepared(tmp_path / "s")
    assert manifest.classes == names["label"]
    assert list(labels_of(manifest, rows).values()) == ["great white shark", "tench", "goldfish"]
    assert set(labels_of(manifest, rows, "test").values()) == {None}
    assert manifest.num_unlabelled == {"test": 3}
    assert prepared(tmp_path / "s", out="none", labels="none")[0].classes == []


def test_a_number_without_a_name_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    for number in (2, -2):
        source = table(tmp_path / f"{number}/a.parquet", {"image": [png(1)], "label": [number]}, {"label": ["a", "b"]})
        with pytest.raises(ValueError, match=rf"has label {number}, but 2 class names"):
            prepared(source)


def test_files_whose_numbers_mean_other_classes_are_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        table(tmp_path / f"s/{number}.parquet", {"image": [png(number)], "label": [0]}, {"label": names})
    with pytest.raises(ValueError, match=r"1.parquet has other class names than 0.parquet"):
        prepared(tmp_path / "s")


def test_a_name_that_the_schema_lacks_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"image": [png(0), png(1)], "label": ["a", "c"]}
    source = table(tmp_path / "s/a.parquet", columns, {"label": ["a", "b"]})
    with pytest.raises(ValueError, match="has label 'c', which is none of the 2 class names of its schema"):
        prepared(source)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"label": [0, 1]}, "1.parquet has labels in its column label, and 0.parquet has no such column"),
        ({"label": [0, 1]}, {}, "1.parquet has no column 'label', unlike 0.parquet"),
        ({"label": [0, 1]}, {"label": ["a", "b"]}, "1.parquet is of type string, and that of 0.parquet is not"),
    ],
)
def test_files_that_label_their_images_differently_are_refused(
    first: dict, second: dict, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    for number, columns in enumerate((first, second)):
        table(tmp_path / f"s/{number}.parquet", {"image": [png(2 * number), png(2 * number + 1)], **columns})
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "s")
    assert prepared(tmp_path / "s", labels="none")[0].num_ok == 4


def test_a_column_of_masks_by_the_name_of_labels_is_passed_over(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"image": structs([png(0), png(1)]), "label": structs([png(2), png(3)])}
    manifest, _ = prepared(table(tmp_path / "s/a.parquet", columns))
    assert (manifest.classes, manifest.num_ok) == ([], 2)
    assert manifest.passed_over == {"columns of images that are not taken (--image-column)": 1}


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
@pytest.mark.parametrize("name", ["image", "image.bytes"])
def test_a_column_of_bytes_of_any_type_and_name_has_the_images(
    kind: pa.DataType, name: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = [png(i) for i in range(4)]
    column = pa.array(images).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(images, kind)
    manifest, rows = prepared(table(tmp_path / "s/a.parquet", {name: column, "label": [0, 1, 0, 1]}))
    assert labels_of(manifest, rows) == {image: str(i % 2) for i, image in enumerate(images)}


def test_a_label_may_be_a_field_of_a_column(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"jpg": [png(0), png(1)], "json": [{"label": "x", "url": "u"}, {"label": "y", "url": "v"}]}
    source = table(tmp_path / "s/a.parquet", columns)
    assert prepared(source)[0].label_candidates == ["column:json.label"]
    manifest, rows = prepared(source, out="b", labels="column:json.label")
    assert labels_of(manifest, rows) == {png(0): "x", png(1): "y"}
    with pytest.raises(ValueError, match=r"has no column 'json\.caption'"):
        prepared(source, labels="column:json.caption")


def test_folders_that_name_a_column_are_refused_or_name_a_split(png: Png, prepared: Callable, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        table(tmp_path / f"s/label={name}/a.parquet", {"image": [png(number)]})
        table(tmp_path / f"t/split={('train', 'test')[number]}/a.parquet", {"image": [png(number)]})
    with pytest.raises(ValueError, match=r"lies in label=\w+/, whose name is the value of a column that the file"):
        prepared(tmp_path / "s")
    assert prepared(tmp_path / "s", labels="none")[0].num_ok == 2
    assert set(prepared(tmp_path / "t", out="u")[1]) == {"train", "test"}


def test_of_two_label_columns_none_is_taken_without_being_named(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"fine_label": ["c0", "c1", "c2"], "coarse_label": ["k0", "k1"]}
    images, fine, coarse = [png(i) for i in range(6)], [0, 1, 2] * 2, [0, 0, 1] * 2
    source = table(
        tmp_path / "s/a.parquet", {"img": structs(images), "fine_label": fine, "coarse_label": coarse}, names
    )
    manifest, _ = prepared(source)
    assert manifest.classes == []
    assert manifest.label_candidates == ["column:fine_label", "column:coarse_label"]
    assert "the images are unlabelled" in caplog.text
    assert "--labels column:fine_label (3 class names)" in caplog.text
    for column, values in (("fine_label", fine), ("coarse_label", coarse)):
        manifest, rows = prepared(source, out=column, labels=f"column:{column}")
        assert manifest.classes == names[column]
        assert [row["label"] for row in rows["train"]] == values
    with pytest.raises(ValueError, match=r"no column 'fine'; name one of fine_label, coarse_label by --labels column"):
        prepared(source, labels="column:fine")


def test_a_column_that_alone_has_class_names_is_taken(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"image": structs([png(0), png(1)]), "species": [1, 0], "year": [2001, 2002]}
    manifest, rows = prepared(table(tmp_path / "s/a.parquet", columns, {"species": ["wren", "robin"]}))
    assert manifest.classes == ["wren", "robin"]
    assert labels_of(manifest, rows) == {png(0): "robin", png(1): "wren"}


def test_of_several_image_columns_the_named_one_is_taken(png: Png, prepared: Callable, tmp_path: Path) -> None:
    columns = {"left": [png(0), png(1)], "right": [png(2), png(3)], "label": [0, 1]}
    source = table(tmp_path / "s/a.parquet", columns)
    with pytest.raises(ValueError, match=r"no unambiguous column of images .* or choose it by --image-column"):
        prepared(source)
    manifest, rows = prepared(source, image_column="right")
    assert [row["image"] for row in rows["train"]] == [png(2), png(3)]
    assert manifest.passed_over == {"columns of images that are not taken (--image-column)": 1}
    with pytest.raises(ValueError, match=r"no column 'up' of images; those .* are left, right"):
        prepared(source, image_column="up")


def listed(folder: Path, png: Png, text: str) -> Path:
    images = {f"{name}.png": png(i) for i, name in enumerate("abcdef")}
    return fill(folder, {**images, "list.csv": text.encode()}) / "list.csv"


def test_a_list_has_its_columns_named(png: Png, prepared: Callable, tmp_path: Path) -> None:
    lines = "\n".join(f"{name}.png,{i}.0,{i % 2},Dev" for i, name in enumerate("abcde"))
    source = listed(tmp_path / "s", png, f"photo,grade,label,part\n{lines}\nf.png,,1,TRAINING\n")
    options = {"image_column": "photo", "split_column": "part"}
    manifest, rows = prepared(source, **options, labels="column:grade")
    assert manifest.classes == ["0", "1", "2", "3", "4"]
    assert labels_of(manifest, rows, "val") == {png(i): str(i) for i in range(5)}
    assert labels_of(manifest, rows) == {png(5): None}
    assert prepared(source, out="b", **options)[0].classes == ["0", "1"]
    assert prepared(source, out="c", **options, labels="none")[0].classes == []
    with pytest.raises(ValueError, match=r"has no column 'x', but photo, grade, label, part"):
        prepared(source, **options, labels="column:x")


FILES: list[tuple[str, str]] = [
    ("labels.csv", "image,label\ncat/a.png,x\ncat/b.png,y\nc.png,x\n"),
    ("labels.csv", "id,diagnosis\na,x\nb,y\nc,x\n"),
    ("labels.tsv", "file_name\ttarget\na.png\tx\nb.png\ty\nc.png\tx\n"),
    (
        "meta.jsonl",
        '{"file_name": "a.png", "label": "x"}\n{"file_name": "b.png", "label": "y"}\n'
        '{"file_name": "c", "label": "x"}\n',
    ),
]


@pytest.mark.parametrize(("name", "text"), FILES)
def test_a_file_has_the_labels_of_a_folder_and_of_a_tar(
    name: str, text: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = {"cat/a.png": png(0), "cat/b.png": png(1), "c.png": png(2), "cat/d.png": png(3)}
    expected = {png(0): "x", png(1): "y", png(2): "x", png(3): None}
    folder = fill(tmp_path / "s", {**images, name: text.encode()})
    manifest, rows = prepared(folder, labels=f"file:{name}")
    assert labels_of(manifest, rows) == expected
    assert manifest.passed_over == {}
    pack(tmp_path / "t/a.tar", images.items())
    manifest, rows = prepared(tmp_path / "t", out="t-out", labels=f"file:{folder / name}")
    assert labels_of(manifest, rows) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,label\na.png,x\na.png,y\n", "gives a.png the label 'x' and on line 3 'y'; keep one line"),
        ("image,label\nq.png,x\n", r"no row of .* names an image of the source \(it has q.png"),
        ("image,label\n,x\n", "line 2 of .* names no image"),
        ("age,height\n1,2\n", "has columns age, height, of which none is clearly image and label"),
        ("image,label,split\na.png,x,holdout\n", "has split 'holdout'; it must be train, val or test"),
        ("image,label\n1.png,x\n", "names 1.png, which could be .* or .*; give paths below the source"),
        ("image,label\na.png\n", "line 2 of .* has 1 fields where the header has 2"),
        ("image,label\na.png,x,y\n", "line 2 of .* has 3 fields where the header has 2"),
        ("image;label\na.png;x\n", "fields of .* are separated by ';'; separate them by commas in a .csv"),
        ("image,label,Label\na.png,x,y\n", "has the column 'label' twice; rename one"),
        ("image,dx,dx_type\na.png,x,y\n", "has the columns dx, dx_type, .* as in --labels file:l.csv:dx"),
        ("image,age\na.png,x\n" + "y" * 140_000 + ",z\n", r"is not CSV \(field larger"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_refused(
    text: str, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images = {"a.png": png(0), "b.png": png(1), "x/1.png": png(2), "y/1.png": png(3)}
    with pytest.raises(ValueError, match=words):
        prepared(fill(tmp_path / "s", {**images, "l.csv": text.encode()}), labels="file:l.csv")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.jsonl", '{"image": "a.png", "label": [0, 1]}', "line 1 of .* has a label that is a list, but an image has"),
        ("l.jsonl", '{"image": "a.png", "label": 0.5}', "line 1 of .* has label 0.5, but a class is a name"),
        ("l.jsonl", '["a.png", "x"]', "line 1 of .* is no JSON object, such as"),
        ("l.jsonl", "[" * 100_000, "line 1 of .* is not JSON"),
        ("l.json", "{}", r"is no table that is read; save it as CSV, TSV or JSON lines \(.jsonl\)"),
        ("gone.csv", "", r"there is no l.csv in .*, and no .*/l.csv; check the path"),
    ],
)
def test_a_table_of_another_kind_is_refused(
    name: str, text: str, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = fill(tmp_path / "s", {"a.png": png(0), name: text.encode()})
    with pytest.raises(ValueError, match=words):
        prepared(source, labels=f"file:{name.replace('gone', 'l')}")


def test_a_column_of_a_file_of_labels_is_chosen_by_name(png: Png, prepared: Callable, tmp_path: Path) -> None:
    text = b"image,dx,dx_type,age\na.png,mel,histo,40\nb.png,nv,follow,50\n"
    source = fill(tmp_path / "s", {"a.png": png(0), "b.png": png(1), "l.csv": text})
    for column, classes in (("dx", ["mel", "nv"]), ("dx_type", ["follow", "histo"]), ("age", ["40", "50"])):
        manifest, rows = prepared(source, out=column, labels=f"file:l.csv:{column}")
        assert [name for name in manifest.classes if name in classes] == classes
        assert set(labels_of(manifest, rows).values()) == set(classes)
    with pytest.raises(ValueError, match=r"has columns image, dx, dx_type, age, of which none is sex"):
        prepared(source, labels="file:l.csv:sex")


def test_each_split_may_have_its_own_file_of_labels(png: Png, prepared: Callable, tmp_path: Path) -> None:
    files = {"train/0.png": png(0), "train/x/1.png": png(1), "test/0.png": png(2), "test/2.png": png(3)}
    files |= {"train/metadata.csv": b"file_name,label\n0.png,a\nx/1.png,b\n"}
    files |= {"test/metadata.csv": b"file_name,label\n0.png,b\n2.png,\n"}
    source = fill(tmp_path / "s", files)
    assert prepared(source, max_skipped=0)[0].label_candidates == ["file:metadata.csv"]
    manifest, rows = prepared(source, out="all", labels="file:metadata.csv")
    assert labels_of(manifest, rows) == {png(0): "a", png(1): "b"}
    assert labels_of(manifest, rows, "test") == {png(2): "b", png(3): None}
    assert manifest.passed_over == {}
    manifest, rows = prepared(source, out="one", labels="file:train/metadata.csv")
    assert labels_of(manifest, rows) == {png(0): "a", png(1): "b"}
    assert set(labels_of(manifest, rows, "test").values()) == {None}


def test_a_file_of_labels_beside_images_is_said_to_be_unused(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fill(tmp_path / "s", {"a.png": png(0), "b.png": png(1), "train.csv": b"id,breed\na,x\nb,y\n"})
    manifest, _ = prepared(source)
    assert manifest.label_candidates == ["file:train.csv"]
    assert manifest.passed_over == {"no image (*.csv)": 1}
    assert "--labels file:train.csv (table with columns id, breed)" in caplog.text
    manifest, rows = prepared(source, out="named", labels=manifest.label_candidates[0])
    assert labels_of(manifest, rows) == {png(0): "x", png(1): "y"}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_labels_in_files_beside_the_images_are_used_if_named(
    kind: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= {
            f"{i:03d}.png": png(i), f"{i:03d}.txt": b"a caption", f"{i:03d}.label": str(i % 2).encode(),
            f"{i:03d}.json": json.dumps({"url": "u", "label": i % 3, "meta": {"ok": i == 1}, "tags": [1]}).encode(),
        }  # fmt: skip
    source = fill(tmp_path / "s", members) if kind == "folder" else pack(tmp_path / "s/a.tar", members.items())

    def numbers(labels: str) -> list[str | None]:
        manifest, rows = prepared(source, out=labels.replace(":", "-"), labels=labels)
        found = labels_of(manifest, rows)
        return [found[png(i)] for i in range(4)]

    assert numbers("json:label") == ["0", "1", "2", "0"]
    assert numbers("json:meta.ok") == ["False", "True", "False", "False"]
    assert numbers("member:label") == ["0", "1", "0", "1"]
    assert numbers("member:txt") == ["a caption"] * 4
    with pytest.raises(ValueError, match=r"key tags of .*json has a label that is a list, but an image has one class"):
        numbers("json:tags")
    assert numbers("member:.label") == ["0", "1", "0", "1"]
    for missing in ("json:nothing", "member:nothing"):
        words = f"no image of .* has a label by --labels {missing}; labels that may be meant: --labels"
        with pytest.raises(ValueError, match=words):
            numbers(missing)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_json_may_have_the_whole_name_of_its_image(kind: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= {f"{i}.png": png(i), f"{i}.png.json": json.dumps({"label": i % 2}).encode()}
    source = fill(tmp_path / "s", members) if kind == "folder" else pack(tmp_path / "s/a.tar", members.items())
    manifest, rows = prepared(source, labels="json:label")
    assert labels_of(manifest, rows) == {png(i): str(i % 2) for i in range(4)}


@pytest.mark.parametrize("value", ["1e999", "[" * 100_000])
def test_json_that_no_class_can_be_read_from_is_refused(
    value: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = fill(tmp_path / "s", {"0.png": png(0), "0.json": f'{{"label": {value}}}'.encode()})
    assert prepared(source)[0].classes == []
    with pytest.raises(ValueError, match=r"has label inf, but a class is|0.json is not JSON"):
        prepared(source, out="b", labels="json:label")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("column:x", "labels column:x is not for a folder of images; use one of auto, folder, none, json:"),
        ("colum:x", "labels 'colum:x' is none of auto, folder, none, column:NAME"),
        ("member:", "labels 'member:' is none of auto"),
    ],
)
def test_labels_that_a_source_cannot_have_are_refused(
    labels: str, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        prepared(fill(tmp_path / "s", {"a.png": png(0)}), labels=labels)


@pytest.mark.parametrize(
    ("files", "labels", "classes", "words"),
    [
        ({"a/0.png": 0, "b/1.png": 1}, "auto", ["a", "b"], r"labels \(folders\): 2 classes, 2 of 2 images"),
        ({"a/0.png": 0, "a/1.png": 1}, "auto", [], "all are in one folder, a; --labels folder takes it as a class"),
        ({"a/0.png": 0, "a/1.png": 1}, "folder", ["a"], r"1 classes, 2 of 2 images"),
        ({"a/0.png": 0, "b/c/1.png": 1}, "auto", [], "not all are one folder deep, such as b/c/1.png; --labels folder"),
        ({"0.png": 0, "1.png": 1}, "auto", [], "there are no class folders"),
        ({"train/a/0.png": 0, "train/b/1.png": 1, "test/2.png": 2}, "folder", ["a", "b"], r"2 of 3 images labelled"),
    ],
)
def test_why_folders_are_no_labels_is_said(
    files: dict[str, int], labels: Any, classes: list[str], words: str, png: Png, prepared: Callable, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "pipelines")
    source = fill(tmp_path / "s", {name: png(i) for name, i in files.items()})
    manifest, _ = prepared(source, labels=labels)
    assert manifest.classes == classes
    assert re.search(words, caplog.text)


def test_an_image_that_a_list_labels_twice_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = listed(tmp_path / "a", png, "uri,label\na.png,cat\nb.png,dog\n./a.png,dog\n")
    with pytest.raises(UserError, match=r"has a.png twice, as 'cat' and as 'dog'"):
        prepared(source)
    with pytest.raises(UserError, match=r"has a.png twice, as 'cat' and as 'dog'"):
        inspect_uri(str(source), InspectConfig(out=str(tmp_path / "sheet.png")))
    manifest, rows = prepared(listed(tmp_path / "b", png, "uri,label\na.png,cat\n./a.png,cat\nb.png,dog\n"))
    assert (manifest.num_found, manifest.num_ok, manifest.num_duplicates) == (3, 2, 1)
    assert labels_of(manifest, rows) == {png(0): "cat", png(1): "dog"}


def test_classes_that_look_alike_are_said(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "uri,label\na.png,caf\u00e9\nb.png,cafe\u0301\nc.png,Cat\nd.png,cat\n"
    manifest, _ = prepared(listed(tmp_path, png, text))
    assert len(manifest.classes) == 4
    assert "'Cat' and 'cat' are two" in caplog.text
    assert caplog.text.count(" are two; rename one") == 2


def test_labels_that_are_probably_none_or_several_are_said(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["N/A", "edema", "mass|edema", "1", "01", "mass"]
    text = "uri,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    images = {f"{i}.png": png(i) for i in range(6)}
    manifest, _ = prepared(fill(tmp_path / "s", {**images, "l.csv": text.encode()}) / "l.csv")
    assert manifest.classes == sorted(labels)
    assert "class 'N/A' is one like others; if it means a missing label, leave that empty" in caplog.text
    assert "1 classes such as 'mass|edema' look like several in one; --multi-label takes them apart" in caplog.text
    assert "classes '01' and '1' are two; rename one if they are the same" in caplog.text


def test_a_class_without_an_image_to_train_on_is_said(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["train/a/0.png", "train/b/1.png", "val/c/2.png", "val/b/3.png"]
    prepared(fill(tmp_path / "s", {name: png(i) for i, name in enumerate(names)}))
    assert "1 classes of split val, such as 'c', have no image to train on" in caplog.text


def test_equal_images_with_different_labels_are_said(
    png: Png, prepared: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"train/a/0.png": png(0), "train/b/1.png": png(1), "train/b/2.png": png(1), "test/b/3.png": png(0)}
    manifest, _ = prepared(fill(tmp_path / "s", files))
    assert (manifest.num_duplicates, manifest.notes) == (2, {"duplicate of an image with another label": 1})
    assert "1 of 2 duplicates have another label than the equal image that is kept" in caplog.text
    assert "such as train/a/0.png and test/b/3.png, which stays" in caplog.text


def test_a_byte_order_mark_is_no_part_of_a_label(png: Png, prepared: Callable, tmp_path: Path) -> None:
    members = [("0.png", png(0)), ("0.cls", b"\xef\xbb\xbf1\r\n"), ("1.png", png(1)), ("1.cls", b"0")]
    manifest, rows = prepared(pack(tmp_path / "t/a.tar", members))
    assert labels_of(manifest, rows) == {png(0): "1", png(1): "0"}
