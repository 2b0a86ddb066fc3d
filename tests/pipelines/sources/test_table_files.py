"""Tables of other ecosystems, written by their own writers: the right bytes and labels, or refused by name."""

import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mae_core.errors import UserError
from pipelines.sources import open_source
from pipelines.storage import open_storage
from tests.pipelines.sources.test_listing import assert_law

Png = Callable[[int], bytes]
NUM = 12


def write_lance(path: Path, columns: dict[str, Any]) -> None:
    import lance

    lance.write_dataset(pa.table(columns), str(path) + ".lance", max_rows_per_file=5)


def write_mds(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pytest.importorskip("streaming", reason="no extra has mosaicml-streaming, whose pins exclude others: see docs")
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    of_type = {bytes: "bytes", int: "int", str: "str"}
    encodings = {name: of_type[type(values[0])] for name, values in columns.items()}
    with MDSWriter(out=str(path), columns=encodings, size_limit=1500, **options) as writer:
        for row in range(len(columns["image"])):
            writer.write({name: values[row] for name, values in columns.items()})


def write_tfrecord(path: Path, columns: dict[str, Any]) -> None:
    from tfrecord import TFRecordWriter

    names = {"image": "image/encoded", "label": "image/class/label"}
    writer = TFRecordWriter(f"{path}.tfrecord-00000-of-00001")
    for row in range(len(columns["image"])):
        values = {names.get(name, name): values[row] for name, values in columns.items()}
        encoded = {name: value.encode() if isinstance(value, str) else value for name, value in values.items()}
        writer.write({name: (v, "int" if isinstance(v, int) else "byte") for name, v in encoded.items()})
    writer.close()


def write_lmdb(path: Path, columns: dict[str, Any]) -> None:
    import lmdb

    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"num-samples", str(len(columns["image"])).encode())
        for name, values in columns.items():
            for row, value in enumerate(values):
                content = value if isinstance(value, bytes) else str(value).encode()
                transaction.put(f"{name}-{row + 1:09d}".encode(), content)


WRITERS = {"Lance": write_lance, "MDS": write_mds, "TFRecord": write_tfrecord, "LMDB": write_lmdb}
COLUMNS = {"TFRecord": ("image/encoded", "image/class/label")}


@pytest.mark.parametrize("kind", WRITERS)
def test_bytes_labels_and_splits_are_those_written(kind: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    images = [png(number) for number in range(NUM)]
    labels = [number % 3 if number % 4 else -1 for number in range(NUM)]
    patients = [f"p{number // 2}" for number in range(NUM)]
    (tmp_path / "s").mkdir()
    WRITERS[kind](tmp_path / "s/train", {"image": images, "label": labels, "patient": patients})
    WRITERS[kind](tmp_path / "s/val", {"image": [png(50)], "label": [2], "patient": ["p9"]})
    manifest, rows = prepared(tmp_path / "s")
    assert_law(manifest)
    assert manifest.classes == ["0", "1", "2"]
    assert [row["image"] for row in rows["train"]] == images
    assert [row["label"] for row in rows["train"]] == [None if label < 0 else label for label in labels]
    assert [(row["image"], row["label"]) for row in rows["val"]] == [(png(50), 2)]
    source = open_source(str(tmp_path / "s"), group_column="patient")
    assert [e.bundle for e in source.entries() if e.split == "train"] == patients


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_are_chosen_by_name(kind: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    breeds = ["pug", "cat", "pug", "cat"]
    columns = {"image": [png(n) for n in range(4)], "breed": breeds, "mask": [png(n + 9) for n in range(4)]}
    WRITERS[kind](tmp_path / "s/all", columns)
    manifest, _ = prepared(tmp_path / "s", max_skipped=1)
    assert manifest.classes == []
    assert "column:breed" in manifest.label_candidates
    manifest, rows = prepared(tmp_path / "s", out="b", labels="column:breed", image_column="mask")
    assert [row["image"] for row in rows["train"]] == columns["mask"]
    assert [manifest.classes[row["label"]] for row in rows["train"]] == breeds
    with pytest.raises(UserError, match="no column 'species'"):
        prepared(tmp_path / "s", out="c", labels="column:species")


@pytest.mark.parametrize(
    ("kind", "module"), [("Lance", "lance"), ("MDS", "streaming"), ("TFRecord", "tfrecord"), ("LMDB", "lmdb")]
)
def test_a_missing_library_is_named_with_its_install_line(
    kind: str, module: str, png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    WRITERS[kind](tmp_path / "s/train", {"image": [png(0)], "label": [0]})
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install ('\.\[tables\]'|--no-deps mosaicml-streaming)"):
        open_source(str(tmp_path / "s"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_cut_is_refused(kind: str, png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    WRITERS[kind](tmp_path / "s/train", {"image": [png(n) for n in range(NUM)], "label": list(range(NUM))})
    suffixes = (".mds", ".lance", ".mdb", "-00001")
    largest = max((p for p in (tmp_path / "s").rglob("*") if p.name.endswith(suffixes) and p.is_file()), key=_size)
    largest.write_bytes(largest.read_bytes()[: _size(largest) * 4 // 9])
    with pytest.raises(ValueError, match="is not an intact"):
        prepared(tmp_path / "s")
    assert not (tmp_path / "out/manifest.json").exists()


def _size(path: Path) -> int:
    return path.stat().st_size


def test_a_lance_dataset_is_read_as_it_was_listed(png: Png, prepared: Callable, tmp_path: Path) -> None:
    import lance

    write_lance(tmp_path / "train", {"image": [png(n) for n in range(NUM)], "label": [str(n) for n in range(NUM)]})
    dataset = lance.dataset(str(tmp_path / "train.lance"))
    dataset.delete("label = '1' or label = '6' or label = '7'")
    source = open_source(str(tmp_path / "train.lance"))
    entries = list(source.entries())
    dataset.delete("label = '0'")
    left = [n for n in range(NUM) if n not in (1, 6, 7)]
    assert [entry.label for entry in entries] == [str(n) for n in left]
    assert list(source.place.contents(entries)) == [png(n) for n in left]
    manifest, rows = prepared(tmp_path / "train.lance")
    assert [row["image"] for row in rows["train"]] == [png(n) for n in left[1:]]
    assert set(manifest.splits) == {"train"}


def test_blobs_of_lance_are_images(png: Png, tmp_path: Path) -> None:
    import lance

    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = pa.table({"image": pa.array([png(n) for n in range(4)], pa.large_binary())}, pa.schema([blob]))
    lance.write_dataset(table, str(tmp_path / "x.lance"), max_rows_per_file=3)
    source = open_source(str(tmp_path))
    assert list(source.place.contents(list(source.entries()))) == [png(n) for n in range(4)]


def test_mds_is_read_by_what_its_encodings_mean(png: Png, prepared: Callable, tmp_path: Path) -> None:
    pytest.importorskip("streaming", reason="no extra has mosaicml-streaming, whose pins exclude others: see docs")
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    pictures = [Image.open(io.BytesIO(png(n))).convert("RGB") for n in range(3)]
    columns = {"png": "png", "pil": "pil", "array": "ndarray", "palette": "pil", "code": "pkl", "label": "uint8"}
    with MDSWriter(out=str(tmp_path / "s"), columns=columns) as writer:
        for number, picture in enumerate(pictures):
            values = {"png": picture, "pil": picture, "array": np.asarray(picture), "palette": picture.quantize(8)}
            writer.write({**values, "code": {"a": 1}, "label": np.uint8(number)})
    for column in ("png", "pil", "array"):
        source = tmp_path / "s"
        manifest, rows = prepared(source, out=column, image_column=column, max_skipped=1)
        assert manifest.num_ok == 3
        assert [row["label"] for row in rows["train"]] == [0, 1, 2]
        if column != "array":
            found = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows["train"]]
            assert all((a == np.asarray(b)).all() for a, b in zip(found, pictures))
    with pytest.raises(UserError, match="MDS's pil of mode P, which stores no palette"):
        prepared(tmp_path / "s", out="palette", image_column="palette", max_bad=1, max_skipped=1)
    with pytest.raises(UserError, match=r"column code .* has struct"):
        prepared(tmp_path / "s", out="code", image_column="png", labels="column:code", max_skipped=1)


@pytest.mark.parametrize("codec", ["br", "bz2", "gz", "snappy", "zstd"])
def test_compressed_shards_of_mds_are_read_as_the_others(
    codec: str, png: Png, prepared: Callable, tmp_path: Path
) -> None:
    images, labels = [png(number) for number in range(NUM)], [number % 3 for number in range(NUM)]
    write_mds(tmp_path / "s/train", {"image": images, "label": labels}, compression=codec)
    shards = sorted((tmp_path / "s/train").glob(f"*.mds.{codec}"))
    assert len(shards) > 1, "every shard is compressed"
    manifest, rows = prepared(tmp_path / "s")
    assert [(row["image"], row["label"]) for row in rows["train"]] == list(zip(images, labels))
    assert not list(Path(tempfile.gettempdir()).glob("mae-mds-*"))
    # Unpacked beside itself, a shard is read once.
    from streaming.base.compression import decompress  # pyright: ignore[reportMissingImports]

    unpacked = shards[0].with_suffix("")
    unpacked.write_bytes(decompress(codec, shards[0].read_bytes()))
    manifest, _ = prepared(tmp_path / "s", out="both")
    assert (manifest.num_ok, manifest.passed_over) == (NUM, {"compressed copies of shards": 1})
    unpacked.unlink()
    index = json.loads((tmp_path / "s/train/index.json").read_bytes())
    for claimed in (index["shards"][0]["raw_data"]["bytes"] - 1, 2**31, 2**40):
        index["shards"][0]["raw_data"]["bytes"] = claimed
        (tmp_path / "s/train/index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"shard.00000.mds.* is not an intact MDS shard"):
            list(open_source(str(tmp_path / "s")).entries())
    shards[0].write_bytes(b"not packed")
    with pytest.raises(UserError, match=r"shard.00000.mds.* is not an intact MDS shard"):
        list(open_source(str(tmp_path / "s")).entries())


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["Lance", "MDS", "MDS of zstd", "TFRecord", "LMDB"])
def test_tables_in_a_bucket_are_read_or_refused_by_name(
    kind: str, png: Png, prepared: Callable, tmp_path: Path, s3: str
) -> None:
    images, labels = [png(number) for number in range(NUM)], [number % 3 for number in range(NUM)]
    (tmp_path / "s").mkdir()
    options = {"compression": "zstd"} if kind.endswith("zstd") else {}
    WRITERS[kind.partition(" ")[0]](tmp_path / "s/train", {"image": images, "label": labels}, **options)
    bucket = open_storage(f"{s3}/tables-{kind.replace(' ', '-')}")
    for path in filter(Path.is_file, (tmp_path / "s").rglob("*")):
        bucket.write(path.relative_to(tmp_path / "s").as_posix(), path.read_bytes())
    if kind == "LMDB":
        with pytest.raises(UserError, match=r"LMDB files are read from a folder of this machine; copy them to one"):
            prepared(bucket.uri)
        return
    _, rows = prepared(bucket.uri)
    assert [(row["image"], row["label"]) for row in rows["train"]] == list(zip(images, labels))


def test_a_missing_shard_of_mds_is_named_and_names_stay_inside(png: Png, tmp_path: Path) -> None:
    write_mds(tmp_path / "s", {"image": [png(n) for n in range(NUM)], "label": list(range(NUM))})
    index = json.loads((tmp_path / "s/index.json").read_bytes())
    (tmp_path / "s" / index["shards"][1]["raw_data"]["basename"]).unlink()
    with pytest.raises(UserError, match=r"index.json names shard.00001.mds, which is missing"):
        list(open_source(str(tmp_path / "s")).entries())
    index["shards"] = [{**index["shards"][0], "raw_data": {"basename": "../../etc/passwd", "bytes": 3, "hashes": {}}}]
    (tmp_path / "s/index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names .*passwd, which is missing|does not name"):
        list(open_source(str(tmp_path / "s")).entries())


def test_damage_within_a_tfrecord_is_found_by_its_checksum(png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_tfrecord(tmp_path / "s/a", {"image": [png(n) for n in range(3)], "label": [0, 1, 2]})
    (path,) = (tmp_path / "s").iterdir()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum of the record"):
        prepared(tmp_path / "s")
    content[:8] = (2**60).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum of the length at byte 0"):
        prepared(tmp_path / "s")


def test_a_label_that_only_later_records_have_is_not_lost(png: Png, tmp_path: Path) -> None:
    from tfrecord import TFRecordWriter

    writer = TFRecordWriter(str(tmp_path / "a.tfrecord"))
    for number in range(70):
        label = {"label": (1, "int")} if number == 69 else {}
        writer.write({"image": (png(0), "byte"), **label})
    writer.close()
    with pytest.raises(UserError, match=r"has feature label at byte \d+, and none before"):
        list(open_source(str(tmp_path)).entries())


def test_images_of_lmdb_are_found_by_content_and_labelled_by_folders_in_keys(
    png: Png, prepared: Callable, tmp_path: Path
) -> None:
    import lmdb

    pairs = {
        f"{split}/{name}/{n}": png(n) for n, (split, name) in enumerate((s, c) for s in ("train", "test") for c in "ab")
    }
    (tmp_path / "s").mkdir()
    with lmdb.open(str(tmp_path / "s"), map_size=2**24) as file, file.begin(write=True) as transaction:
        for key, value in {**pairs, "__len__": pickle.dumps(4)}.items():
            transaction.put(key.encode(), value)
    manifest, rows = prepared(tmp_path / "s")
    assert_law(manifest)
    assert {split: [(row["image"], row["label"]) for row in found] for split, found in rows.items()} == {
        "train": [(png(0), 0), (png(1), 1)],
        "test": [(png(2), 0), (png(3), 1)],
    }
    assert manifest.passed_over == {"locks of LMDB": 1, "pickled values, which are never unpickled": 1}


@pytest.mark.parametrize("kind", ["Parquet", "Lance"])
def test_rows_come_in_the_order_that_is_asked_for(kind: str, png: Png, tmp_path: Path) -> None:
    columns = {"image": [png(n) for n in range(40)], "split": ["test"] * 20 + ["train"] * 20}
    (tmp_path / "s").mkdir()
    if kind == "Parquet":
        pq.write_table(pa.table(columns), tmp_path / "s/a.parquet")
    else:
        write_lance(tmp_path / "s/a", columns)
    source = open_source(str(tmp_path / "s"))
    entries = sorted(source.entries(), key=lambda entry: (entry.split == "test", entry.name))
    assert list(source.place.contents(entries)) == [*columns["image"][20:], *columns["image"][:20]]


def test_pickled_samples_of_lmdb_are_refused_and_never_unpickled(png: Png, prepared: Callable, tmp_path: Path) -> None:
    import lmdb

    path = tmp_path / "s.lmdb"
    with lmdb.open(str(path), map_size=2**24, subdir=False) as file, file.begin(write=True) as transaction:
        for number in range(3):
            transaction.put(number.to_bytes(4, "big"), pickle.dumps((png(number), number)))
    with pytest.raises(UserError, match=r"no value that is an image \(3 pickled values, which are never unpickled"):
        prepared(tmp_path / "s.lmdb")
