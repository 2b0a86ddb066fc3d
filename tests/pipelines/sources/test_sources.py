"""The same images give the same pixels, labels and splits, whatever they are packed in; what is malformed is named."""

import csv
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import open_source

Png = Callable[[int], bytes]


def seen(rows: dict[str, list[dict]], classes: list[str]) -> dict[str, list[tuple]]:
    return {
        split: sorted((row["image"], None if row["label"] is None else classes[row["label"]]) for row in found)
        for split, found in rows.items()
    }


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


IMAGES = {f"{split}/{'cat' if i % 2 else 'dog'}/{i:02d}.png": i for split, numbers in
          (("train", range(14)), ("val", range(20, 24))) for i in numbers}  # fmt: skip


def label(name: str) -> str:
    return name.split("/")[1]


def as_folder(root: Path, png: Png) -> Path:
    return fill(root / "source", {name: png(i) for name, i in IMAGES.items()})


def as_tar_of_folders(root: Path, png: Png) -> Path:
    return pack(root / "source/all.tar", {f"./{name}": png(i) for name, i in IMAGES.items()})


def as_webdataset(root: Path, png: Png) -> Path:
    for split in ("train", "val"):
        members: dict[str, bytes] = {}
        for name, i in IMAGES.items():
            if name.startswith(split):
                members |= {f"{i:05d}.png": png(i), f"{i:05d}.cls": label(name).encode(), f"{i:05d}.json": b"{}"}
        names = sorted(members)
        pack(root / f"source/set-{split}-000000.tar", {name: members[name] for name in names[: len(names) // 2]})
        pack(root / f"source/set-{split}-000001.tar", {name: members[name] for name in names[len(names) // 2 :]})
    return root / "source"


def table(names: list[str], png: Png, kind: str) -> pa.Table:
    images: list[Any] = [png(IMAGES[name]) for name in names]
    if kind == "struct":
        images = [{"bytes": image, "path": name} for image, name in zip(images, names)]
    if kind == "plain":
        return pa.table({"image": images, "label": [label(name) for name in names]})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    found = pa.table({"image": images, "label": [int(label(name) == "dog") for name in names]})
    return found.replace_schema_metadata({"huggingface": json.dumps(features)})


def as_parquet(root: Path, png: Png, kind: str = "plain") -> Path:
    (root / "source/data").mkdir(parents=True)
    for split, word in (("train", "train"), ("val", "validation")):
        names = [name for name in IMAGES if name.startswith(split)]
        path = root / f"source/data/{word}-00000-of-00001.parquet"
        pq.write_table(table(names, png, kind), path, row_group_size=3)
    return root / "source"


def as_hugging_face(root: Path, png: Png) -> Path:
    return as_parquet(root, png, "struct")


def as_csv(root: Path, png: Png) -> Path:
    source = as_folder(root, png)
    with (source / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Label", "uri", "split", "comment"])
        for i, name in enumerate(IMAGES):
            uri = (name, str(source / name), f"file://{source / name}")[i % 3]
            rows.writerow([label(name), uri, name.split("/")[0], "a, b"])
    return source / "list.csv"


def as_parquet_list(root: Path, png: Png) -> Path:
    source = as_folder(root, png)
    names = list(IMAGES)
    splits = [name.split("/")[0] for name in names]
    pq.write_table(
        pa.table({"path": names, "label": list(map(label, names)), "split": splits}), source / "list.parquet"
    )
    return source / "list.parquet"


@pytest.mark.parametrize(
    "packed",
    [as_folder, as_tar_of_folders, as_webdataset, as_parquet, as_hugging_face, as_csv, as_parquet_list],
    ids=lambda packed: packed.__name__,
)
def test_the_same_images_are_the_same_dataset_however_packed(
    packed: Callable, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    manifest, rows = prepared(packed(tmp_path, png))
    expected: dict[str, list[tuple]] = {"train": [], "val": []}
    for name, i in IMAGES.items():
        expected[name.split("/")[0]].append((png(i), label(name)))
    assert seen(rows, manifest.classes) == {split: sorted(found) for split, found in expected.items()}
    assert manifest.classes == ["cat", "dog"]
    assert manifest.passed_over == ({"members *.json beside images": 18} if packed is as_webdataset else {})
    num_images = manifest.num_found - sum(manifest.passed_over.values())
    assert (num_images, manifest.num_ok, manifest.num_quarantined) == (18, 18, 0)
    assert [shard.num_rows for shard in manifest.splits["train"].shards] == [5, 5, 4]


def test_kaggle_imagenet_has_names_ground_truth_and_a_test_without_labels(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    root = "ILSVRC/Data/CLS-LOC"
    source = fill(
        tmp_path / "source",
        {
            "LOC_synset_mapping.txt": b"n02 crane, bird\nn01 tench, Tinca tinca\nn03 crane, machine\n",
            "LOC_val_solution.csv": b"ImageId,PredictionString\nV_2,n02 1 2 3 4 n02 5 6 7 8\nV_1,n03 1 2 3 4 \n",
            "ILSVRC/Annotations/CLS-LOC/val/V_1.xml": b"<a/>",
            f"{root}/train/n01/a.JPEG": png(1),
            f"{root}/train/n02/b.JPEG": png(2),
            f"{root}/val/V_1.JPEG": png(3),
            f"{root}/val/V_2.JPEG": png(4),
            f"{root}/test/T_1.JPEG": png(5),
        },
    )
    manifest, rows = prepared(source)
    assert manifest.passed_over == {"files outside ILSVRC/Data/CLS-LOC/": 1}
    assert manifest.classes == ["n02 crane, bird", "n01 tench, Tinca tinca", "n03 crane, machine"]
    assert seen(rows, manifest.classes) == {
        "train": sorted([(png(1), "n01 tench, Tinca tinca"), (png(2), "n02 crane, bird")]),
        "val": sorted([(png(3), "n03 crane, machine"), (png(4), "n02 crane, bird")]),
        "test": [(png(5), None)],
    }
    (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nV_1,n03 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"the ground truth has no class for .*V_2.JPEG"):
        list(open_source(str(source)).entries())
    (source / "LOC_val_solution.csv").unlink()
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv is missing; copy it there"):
        list(open_source(str(source)).entries())


def test_numbers_as_labels_stay_what_they_are(png: Png, prepared: Callable, tmp_path: Path) -> None:
    members = {f"{i}.{end}": content for i in (2, 5) for end, content in (("cls", str(i).encode()), ("png", png(i)))}
    pack(tmp_path / "source/a.tar", members)
    manifest, rows = prepared(tmp_path / "source")
    assert sorted((row["image"], row["label"]) for row in rows["train"]) == sorted([(png(2), 2), (png(5), 5)])
    assert manifest.classes == ["0", "1", "2", "3", "4", "5"]


def test_names_that_leave_the_source_are_quarantined_and_nothing_outside_is_read(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    fill(tmp_path, {"secret.png": png(99)})
    names = ["../secret.png", "/etc/x.png", "a/../../secret.png", "ok.png"]
    pack(tmp_path / "tars/a.tar", {name: png(i) for i, name in enumerate(names)})
    manifest, rows = prepared(tmp_path / "tars", out="a", max_bad=1)
    assert [row["image"] for row in rows["train"]] == [png(3)]
    assert manifest.quarantine_reasons == {"unsafe name": 3}
    source = fill(tmp_path / "lists", {"ok.png": png(3), "l.csv": b"uri\nok.png\n../secret.png\na/../../secret.png\n"})
    manifest, rows = prepared(source / "l.csv", out="b", max_bad=1)
    assert [row["image"] for row in rows["train"]] == [png(3)]
    assert manifest.quarantine_reasons == {"unsafe name": 2}


def test_a_pickle_in_data_is_never_read(png: Png, prepared: Callable, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Malice:
        def __reduce__(self) -> tuple:
            return (Path.touch, (canary,))

    evil = pickle.dumps(Malice())
    (tmp_path / "source").mkdir()
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    schema = pa.schema([pa.field("image", pa.binary(), metadata=extension), pa.field("label", pa.string())])
    rows = pa.table({"image": [evil, png(1)], "label": ["a", "b"]}, schema=schema)
    pq.write_table(rows.replace_schema_metadata({"huggingface": evil, "pandas": evil}), tmp_path / "source/a.parquet")
    manifest, _ = prepared(tmp_path / "source", max_bad=1)
    assert manifest.quarantine_reasons == {"not a known image format": 1}
    pack(tmp_path / "tars/a.tar", {"a.png": evil, "a.cls": b"1", "a.pyd": evil, "b.png": png(1), "b.cls": b"2"})
    manifest, _ = prepared(tmp_path / "tars", out="t", max_bad=1)
    assert manifest.num_quarantined == 1
    assert not canary.exists()
    pickle.loads(evil)  # noqa: S301 -- the canary sings where a pickle is read
    assert canary.exists()


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return path


def a_tar(tmp_path: Path, png: Png, *labels: bytes) -> Path:
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.cls": label for i, label in enumerate(labels)}
    return pack(tmp_path / "s/a.tar", members)


def damaged_header(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[1024:1100] = b"x" * 76
    path.write_bytes(content)
    return path


def without_end(path: Path) -> Path:
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 10)
    return path


def parquet(tmp_path: Path, columns: dict[str, list]) -> Path:
    (tmp_path / "s").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "s/a.parquet")
    return tmp_path / "s/a.parquet"


def paths_alone() -> pa.Array:
    """Return a column as the Hub's library writes it without the images."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": None, "path": f"/data/{i}.png"} for i in range(2)], kind)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t, png: cut_short(a_tar(t, png)), "a.tar is truncated or damaged; copy it again"),
        (lambda t, png: damaged_header(a_tar(t, png)), "a.tar is truncated or damaged; copy it again"),
        (lambda t, png: without_end(a_tar(t, png)), "a.tar is truncated or damaged; copy it again"),
        (lambda t, png: a_tar(t, png, b"1", b""), "a.tar: 1.cls contains no class"),
        (lambda t, png: a_tar(t, png, b"1", b"\xff\xfe"), "a.tar: 1.cls contains no class"),
        (lambda t, png: a_tar(t, png, b"1", b"2"), "has a label and .* has none; label all"),
        (lambda t, png: a_tar(t, png).rename(t / "s/a.tar.gz"), "compressed archive, .* unpack it"),
        (lambda t, png: pack(t / "s/a.tar", {}), "no image in .*: its tar files are empty"),
        (lambda t, png: parquet(t, {"image": pa.array([], pa.binary())}), "no image in .* with images are empty"),
        (lambda t, png: parquet(t, {"image": [{"bytes": None, "path": "a.png"}]}), "is of type struct<bytes: null"),
        (lambda t, png: parquet(t, {"image": paths_alone()}), "column image.bytes of .* is empty: the file names its"),
        (lambda t, png: fill(t, {"l.tsv": b"path\ta\n"}) / "l.tsv", "l.tsv is a file, and no .csv list, .*its folder"),
        (lambda t, png: fill(t, {"l.csv": b"uri;label\na;1\n"}) / "l.csv", "are separated by ';'; separate them by"),
        (lambda t, png: fill(t, {"l.csv": b"uri,label,label\n"}) / "l.csv", "has the column 'label' twice; rename one"),
        (lambda t, png: cut_short(parquet(t, {"image": [png(1)]})), "a.parquet is not an intact Parquet file"),
        (lambda t, png: parquet(t, {"x": [1], "y": [2]}), r"no unambiguous column of images \(columns: x, y\)"),
        (
            lambda t, png: parquet(t, {"p": [b""], "q": [b""]}),
            r"no unambiguous column of images .*; name one `image`",
        ),
        (
            lambda t, png: fill(t, {"l.csv": b"name,age\na,1\n"}) / "l.csv",
            "names no column of images, but name, age; make it uri",
        ),
        (lambda t, png: fill(t, {"l.csv": b"uri,label\na.png\n"}) / "l.csv", "line 2 of .* has 1 fields where"),
        (lambda t, png: fill(t, {"l.csv": b"uri,label\n,cat\n"}) / "l.csv", "line 2 of .* names no image"),
        (lambda t, png: fill(t, {"l.csv": b"uri,split\na.png,fold\n"}) / "l.csv", "has split 'fold'; it must be train"),
        (lambda t, png: fill(t, {"l.csv": b"uri\nhttp://h/a.png\n"}) / "l.csv", "names http://h/a.png, which cannot"),
        (lambda t, png: fill(t, {"l.csv": b"uri\n\xff\xfe\n"}) / "l.csv", "is not a CSV file in UTF-8"),
        (lambda t, png: fill(t / "s", {"a.png": png(1), "b.tar": b""}), "has .* such as .* prepare one kind"),
        (lambda t, png: fill(t / "s", {"LOC_synset_mapping.txt": b"n01\n"}), "line 1 of .* is not `synset names`"),
    ],
)
def test_a_malformed_source_is_named_before_anything_is_written(
    make: Callable, words: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = make(tmp_path, png)
    with pytest.raises(ValueError, match=words):
        prepared(source)
    assert not (tmp_path / "out").exists()


def test_a_missing_image_of_a_list_is_quarantined(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = fill(tmp_path / "s", {"a.png": png(1), "l.csv": b"uri\na.png\ngone.png\n"}) / "l.csv"
    manifest, _ = prepared(source, max_bad=0.5)
    assert manifest.quarantine_reasons == {"cannot be read": 1}


def test_a_list_in_a_bucket_may_not_name_files_of_this_machine(tmp_path: Path) -> None:
    from pipelines.sources.lists import _entry
    from pipelines.storage import Storage

    for uri in ("/etc/passwd", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="which a list in a bucket may not"):
            _entry(Storage("s3://bucket/lists"), "line 2", {"uri": uri})
    assert _entry(Storage("s3://bucket/lists"), "line 2", {"uri": "s3://other/a.jpg"}).path == "s3://other/a.jpg"


def test_a_prepared_dataset_is_no_source(png: Png, prepared: Callable, tmp_path: Path) -> None:
    prepared(as_folder(tmp_path, png))
    with pytest.raises(ValueError, match="is already a prepared dataset"):
        prepared(tmp_path / "out", out="again")


def test_duplicates_stay_if_asked_and_are_counted_either_way(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = as_folder(tmp_path, png)
    shutil.copy(source / "val/dog/20.png", source / "train/dog/99.png")
    shutil.copy(source / "train/dog/00.png", source / "train/dog/98.png")
    dropped, rows = prepared(source, out="dropped")
    kept, all_rows = prepared(source, out="kept", drop_duplicates=False)
    for manifest in (dropped, kept):
        assert (manifest.num_found, manifest.num_ok, manifest.num_duplicates) == (20, 18, 2)
    assert sum(map(len, rows.values())) == 18
    assert len(rows["val"]) == 4
    assert sum(map(len, all_rows.values())) == 20


def test_too_many_bad_images_end_the_job_with_the_list_and_it_can_go_on(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    source = as_folder(tmp_path, png)
    fill(source, {"train/cat/x.png": b"", "train/cat/y.png": b"no image"})
    words = r"2 of 20 images are bad, more than max_bad 0.05 allows: train/cat/x.png \(empty file\), .*higher --max-bad"
    with pytest.raises(ValueError, match=words):
        prepared(source, max_bad=0.05)
    assert not (tmp_path / "out/manifest.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    manifest, _ = prepared(source, max_bad=0.1)
    assert (manifest.num_found, manifest.num_ok, manifest.num_quarantined) == (20, 18, 2)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}


def test_a_shard_is_bounded_in_bytes(png: Png, prepared: Callable, tmp_path: Path) -> None:
    source = fill(tmp_path / "s", {f"{i}.png": png(i) for i in range(10)})
    manifest, _ = prepared(source, rows_per_shard=100, shard_bytes=3 * len(png(0)) + 30)
    rows = [shard.num_rows for shard in manifest.splits["train"].shards]
    assert sum(rows) == 10
    assert max(rows) <= 3
