"""Shards depend on the source and the config alone, and every file that was found is accounted for."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest
from pipelines.images.decode import decode
from pipelines.prepare import prepare
from pipelines.sources.entry import Entry
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import open_storage
from tests.waiting import JOB_DEADLINE_S, wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray4"),
    # Ray Data 2.60 sets deprecated fields of its own context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]
SMALL = PrepareConfig(rows_per_shard=50, rows_per_group=16)


def files_of(folder: Path | str) -> dict[str, str]:
    """sha256 of every file of a dataset, hidden ones left out."""
    storage = open_storage(folder)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list()}


def rows_of(folder: Path | str, manifest: Manifest) -> dict[str, list[dict]]:
    storage, rows = open_storage(folder), {}
    for name, split in manifest.splits.items():
        tables = [pq.read_table(storage.open_input(shard.path)) for shard in split.shards]
        rows[name] = [row for table in tables for row in table.to_pylist()]
    return rows


def quarantined(folder: Path | str) -> list[dict]:
    storage = open_storage(folder)
    paths = [path for path, _ in storage.list("quarantine")]
    return [row for path in paths for row in pq.read_table(storage.open_input(path)).to_pylist()]


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_labelled_source_with_a_test_folder(few: Path, tmp_path: Path) -> None:
    manifest = prepare(str(few), str(tmp_path / "out"), SMALL)
    rows = rows_of(tmp_path / "out", manifest)
    assert manifest.classes == ["bag", "dress", "sneaker"]
    assert {name: len(found) for name, found in rows.items()} == {n: s.num_rows for n, s in manifest.splits.items()}
    assert len(rows["test"]) == 60
    assert len(rows["train"]) + len(rows["val"]) == 240
    assert 8 <= len(rows["val"]) <= 45
    assert (manifest.num_found, manifest.num_ok, manifest.channels, manifest.image_px) == (300, 300, 1, (28, 28))
    for name, found in rows.items():
        for row in found:
            assert row["image"] == (few / row["source"]).read_bytes()
            assert row["source"].startswith("test/" if name == "test" else "train/")
            assert manifest.classes[row["label"]] == row["source"].split("/")[1]
            assert (row["height_px"], row["width_px"], row["orientation"], row["segment_offsets"]) == (28, 28, 1, None)
    # Stored in an order in which a window of any size sees every class.
    for found in rows.values():
        assert {row["label"] for row in found[:20]} == {0, 1, 2}


def test_shards_say_what_they_hold(few: Path, tmp_path: Path) -> None:
    manifest = prepare(str(few), str(tmp_path), SMALL)
    first_id = 0
    for split in manifest.splits.values():
        for shard in split.shards:
            file = pq.ParquetFile(tmp_path / shard.path)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert sum(groups) == shard.num_rows
            assert groups[:-1] == [16] * (len(groups) - 1)
            assert 0 < groups[-1] <= 16
            assert len(groups) == shard.num_groups
            content = (tmp_path / shard.path).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
            assert shard.first_id == first_id
            first_id += shard.num_rows
        assert split.num_bytes == sum(shard.num_bytes for shard in split.shards)


def test_mean_and_std_are_those_of_the_training_split(few: Path, tmp_path: Path) -> None:
    manifest = prepare(str(few), str(tmp_path), SMALL)
    pixels = np.stack([decode(row["image"], 1) for row in rows_of(tmp_path, manifest)["train"]]) / 255
    np.testing.assert_allclose(manifest.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(manifest.std, [pixels.std()], rtol=1e-12)


def test_parallelism_and_repetition_change_no_byte(few: Path, tmp_path: Path) -> None:
    import ray

    first = prepare(str(few), str(tmp_path / "a"), SMALL)
    waiting = ray.remote(num_cpus=3)(lambda: threading.Event().wait()).remote()
    try:
        wait_until(lambda: ray.available_resources().get("CPU", 0) <= 1, "the task that holds three CPUs")
        assert prepare(str(few), str(tmp_path / "b"), SMALL) == first
    finally:
        ray.cancel(waiting, force=True)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert prepare(str(few), str(tmp_path / "a"), SMALL) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}


def test_a_shard_depends_on_nothing_but_its_slice(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "more")
    names = [str(path.relative_to(few)) for path in (few / "train").rglob("*.png")]
    with closing(SortedEntries(Entry(name, name) for name in names)) as entries:
        *_, last = entries
    (tmp_path / "more" / last.path).unlink()
    one = prepare(str(few), str(tmp_path / "a"), SMALL)
    two = prepare(str(tmp_path / "more"), str(tmp_path / "b"), SMALL)
    assert one.digest != two.digest
    differing = set(dict(files_of(tmp_path / "a").items() ^ files_of(tmp_path / "b").items()))
    assert differing <= {"manifest.json", "train/part-00004.parquet", "val/part-00004.parquet"}


def test_the_zoo_is_accounted_for(zoo: list, tmp_path: Path) -> None:
    contents = {f"folder{i % 3}/deeper/{animal.name}": animal.content for i, animal in enumerate(zoo)}
    contents["copies/again.jpg"] = zoo[0].content
    contents["copies/empty-again.jpg"] = b""
    contents["notes.txt"] = b"no image"
    contents[".thumbnails/x.png"] = zoo[0].content
    source = fill(tmp_path / "zoo", contents)
    manifest = prepare(str(source), str(tmp_path / "out"), PrepareConfig(rows_per_shard=7, rows_per_group=3, max_bad=1))
    whole = {f"folder{i % 3}/deeper/{a.name}": a for i, a in enumerate(zoo) if not a.reason}
    assert manifest.num_found == len(zoo) + 3
    assert manifest.num_ok == len(whole)
    assert manifest.num_duplicates == 1
    assert manifest.passed_over == {"no image (*.txt)": 1}
    assert manifest.num_found == manifest.num_ok + manifest.num_quarantined + manifest.num_duplicates + 1
    refused = quarantined(tmp_path / "out")
    assert sum(manifest.quarantine_reasons.values()) == manifest.num_quarantined == len(refused)
    assert manifest.quarantine_reasons == dict(sorted(Counter(r["reason"].split(":")[0] for r in refused).items()))
    assert all(row["num_bytes"] == len(contents[row["source"]]) for row in refused)
    kept = {row["source"]: row for rows in rows_of(tmp_path / "out", manifest).values() for row in rows}
    assert set(kept) == set(contents) - {r["source"] for r in refused} - {
        "copies/again.jpg", "notes.txt", ".thumbnails/x.png"
    }  # fmt: skip
    assert (manifest.channels, manifest.image_px, manifest.classes) == (3, None, [])
    for row in kept.values():
        decoded = decode(row["image"], 3, row["orientation"])
        assert decoded.shape == (row["height_px"], row["width_px"], 3)


def test_a_copy_in_test_is_kept_and_in_training_left_out(few: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(few, source)
    stolen = sorted((source / "test/bag").iterdir())[0]
    shutil.copy(stolen, source / "train/bag/00000.png")
    shutil.copy(stolen, source / "train/sneaker/99999.png")
    original = prepare(str(few), str(tmp_path / "a"), SMALL)
    manifest = prepare(str(source), str(tmp_path / "b"), SMALL)
    assert manifest.num_duplicates == manifest.num_found - manifest.num_ok == 2
    assert manifest.num_ok == original.num_ok
    assert manifest.splits["test"].num_rows == 60
    sources = [row["source"] for rows in rows_of(tmp_path / "b", manifest).values() for row in rows]
    assert "train/bag/00000.png" not in sources
    assert manifest.mean == original.mean


def test_a_slice_of_copies_alone_leaves_no_shard(few: Path, tmp_path: Path) -> None:
    image = next((few / "test/bag").iterdir()).read_bytes()
    source = fill(tmp_path / "source", {f"{i:03d}.png": image for i in range(100)})
    manifest = prepare(str(source), str(tmp_path / "out"), SMALL)
    assert (manifest.num_ok, manifest.num_duplicates) == (1, 99)
    assert len([path for path in files_of(tmp_path / "out") if path.endswith(".parquet")]) == 1
    assert manifest.classes == []


def test_a_val_folder_is_used_and_nothing_held_out(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "train", tmp_path / "source/train")
    shutil.copytree(few / "test", tmp_path / "source/val")
    manifest = prepare(str(tmp_path / "source"), str(tmp_path / "out"), SMALL)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 240, "val": 60}


def test_held_out_images_depend_on_content_and_seed_not_on_names(few: Path, tmp_path: Path) -> None:
    def held_out(source: Path, out: str, seed: int) -> set[bytes]:
        config = PrepareConfig(rows_per_shard=50, rows_per_group=16, seed=seed, val_fraction=0.3)
        manifest = prepare(str(source), str(tmp_path / out), config)
        return {row["image"] for row in rows_of(tmp_path / out, manifest)["val"]}

    renamed = tmp_path / "renamed"
    for i, path in enumerate(sorted((few / "train").rglob("*.png"), reverse=True)):
        fill(renamed, {f"{i:05d}.png": path.read_bytes()})
    first = held_out(few / "train", "a", 0)
    assert first == held_out(renamed, "b", 0)
    assert first != held_out(renamed, "c", 1)
    assert 45 <= len(first) <= 100


@pytest.mark.parametrize(
    ("labels", "paths", "expected"),
    [
        ("auto", ["a/1.png", "b/2.png"], ["a", "b"]),
        ("auto", ["a/1.png", "a/2.png"], []),
        ("auto", ["a/1.png", "b/c/2.png"], []),
        ("auto", ["1.png", "b/2.png"], []),
        ("folder", ["a/1.png", "b/c/2.png"], ["a", "b"]),
        ("none", ["a/1.png", "b/2.png"], []),
    ],
)
def test_labels(labels, paths: list[str], expected: list[str], few: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted((few / "test/bag").iterdir())]
    source = fill(tmp_path / "source", dict(zip(paths, images)))
    manifest = prepare(str(source), str(tmp_path / "out"), PrepareConfig(labels=labels, val_fraction=0))
    assert manifest.classes == expected
    rows = rows_of(tmp_path / "out", manifest)["train"]
    found = {row["source"]: row["label"] for row in rows}
    assert found == dict(zip(paths, [0, 1] if expected else [None, None]))


def test_wrong_sources_are_refused_and_leave_nothing(few: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "out", next((few / "test/bag").iterdir()).read_bytes()
    (tmp_path / "empty").mkdir()
    broken = fill(tmp_path / "broken", {"a.png": b"x", "b.jpg": b""})
    mixed = fill(tmp_path / "mixed", {"train/a.png": image, "b.png": image})
    flat = fill(tmp_path / "flat", {"a.png": image, "b/b.png": image})
    for source, config, words in (
        (tmp_path / "absent", SMALL, "does not exist; give a folder"),
        (tmp_path / "empty", SMALL, "no image in .*; give a folder that has files ending in .jpg"),
        (broken, SMALL, r"no readable image among the 2 files of .* \(1 empty file, 1 not a known image format\)"),
        (mixed, SMALL, "has train/ and also 1 images outside them, such as b.png; move them"),
        (flat, PrepareConfig(labels="folder"), "a.png is in no class folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            prepare(str(source), str(out), config)
        assert not out.exists() or not list(out.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(few: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other", {"thesis.txt": b"my only copy"})
    with pytest.raises(ValueError, match="is not empty and holds no prepared dataset; choose another"):
        prepare(str(few), str(other), SMALL)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    prepare(str(few), str(tmp_path / "out"), SMALL)
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a dataset of another config; choose another folder"):
        prepare(str(few), str(tmp_path / "out"), PrepareConfig(seed=1))
    with pytest.raises(ValueError, match="holds a dataset of another source;"):
        prepare(str(few / "train"), str(tmp_path / "out"), SMALL)
    assert files_of(tmp_path / "out") == before


def test_an_unfinished_preparation_of_something_else_is_left_alone(few: Path, tmp_path: Path) -> None:
    fill(tmp_path, {".prepare/claim.json": b'{"source_digest": "other"}', "train/part-00000.parquet": b"x"})
    with pytest.raises(ValueError, match="holds the unfinished preparation of another source or config"):
        prepare(str(few), str(tmp_path), SMALL)
    assert (tmp_path / "train/part-00000.parquet").read_bytes() == b"x"


KILLED = """
import sys, time, threading, logging, os, signal
import ray
from pipelines import prepare as module
from pipelines.config import PrepareConfig
from pipelines.sources.entry import Entry
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import open_storage
ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, _temp_dir=sys.argv[4])
source, out, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
def die():
    target = open_storage(out)
    while len(target.list()) < after:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=die, daemon=True).start()
module.prepare(source, out, PrepareConfig(rows_per_shard=50, rows_per_group=16))
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 6])
def test_killed_anywhere_it_leaves_no_dataset_and_a_rerun_is_byte_identical(
    few: Path, tmp_path: Path, after: int
) -> None:
    undisturbed = prepare(str(few), str(tmp_path / "a"), SMALL)
    out = tmp_path / "b"
    # Outside tmp_path, since a socket's path may be 107 bytes long; a killed Ray may still write into it.
    scratch = tempfile.TemporaryDirectory(prefix="mae-kill-", dir="/tmp", ignore_cleanup_errors=True)
    with scratch as ray_folder, (tmp_path / "log").open("wb") as log:
        words = [sys.executable, "-c", KILLED, str(few), str(out), str(after), ray_folder]
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.wait(JOB_DEADLINE_S) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not is_prepared(open_storage(out))
    with pytest.raises(ValueError, match="is not a prepared dataset"):
        read_manifest(open_storage(out))
    assert json.loads((out / ".prepare/claim.json").read_text())
    assert prepare(str(few), str(out), SMALL) == undisturbed
    assert files_of(tmp_path / "a") == files_of(out)
    assert not list(out.rglob(".*"))


@pytest.mark.s3
def test_to_s3_and_from_s3_equal_local(few: Path, tmp_path: Path, s3: str) -> None:
    local = prepare(str(few), str(tmp_path / "out"), SMALL)
    target = f"{s3}/{tmp_path.name}"
    assert prepare(str(few), f"{target}/out", SMALL) == local
    assert files_of(f"{target}/out") == files_of(tmp_path / "out")
    assert prepare(str(few), f"{target}/out", SMALL) == local
    copy = open_storage(f"{target}/source")
    for path, _ in open_storage(few).list():
        copy.write(path, (few / path).read_bytes())
    assert prepare(f"{target}/source", str(tmp_path / "from-s3"), SMALL) == local
    assert files_of(tmp_path / "from-s3") == files_of(tmp_path / "out")
