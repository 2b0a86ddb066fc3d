"""The same laws hold for a folder and for a real S3 server."""

import errno
import os
import pickle
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.storage import Storage, open_storage, storage_of
from pipelines.storage.retries import retry_limit
from tests.waiting import join


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "place")
    return open_storage(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def test_what_was_written_is_read(storage: Storage) -> None:
    for content in (b"", b"first", b"second", b"x" * 20_000_000):
        storage.write("a/b.bin", content)
        assert storage.read("a/b.bin") == content


def test_a_list_has_sizes_is_sorted_and_knows_prefix_and_suffix(storage: Storage) -> None:
    for path in ("b.txt", "a/z.txt", "a/b/c.bin", "ab/x.txt", ".hidden", "a/.hidden/x.txt"):
        storage.write(path, path.encode())
    assert storage.list() == [("a/b/c.bin", 9), ("a/z.txt", 7), ("ab/x.txt", 8), ("b.txt", 5)]
    assert storage.list("a") == [("a/b/c.bin", 9), ("a/z.txt", 7)]
    assert storage.list(suffix=".bin") == [("a/b/c.bin", 9)]
    assert storage.list("nothing") == []


def test_an_absent_place_is_empty_and_has_no_files(storage: Storage) -> None:
    assert storage.is_empty()
    assert not storage.exists()
    assert not storage.exists("x")
    assert storage.list() == []
    with pytest.raises(FileNotFoundError, match=r"/x does not exist; check the path"):
        storage.read("x")


def test_deleting_is_idempotent_and_a_tree_takes_hidden_files_along(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.write(".c", b"2")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")
    assert storage.exists(".c")
    assert not storage.is_empty()
    storage.delete_tree()
    storage.delete_tree()
    assert storage.is_empty()


def test_of_several_that_write_a_new_file_one_wins(storage: Storage) -> None:
    contents = [f"writer {i}".encode() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda content: storage.write_new("claim", content), contents))
    assert sum(won) == 1
    assert storage.read("claim") == contents[won.index(True)]
    assert storage.write_new("claim", storage.read("claim"))
    assert [path for path, _ in storage.list()] == ["claim"]


def test_a_range_is_read_and_ends_where_the_file_ends(storage: Storage) -> None:
    content = bytes(range(256)) * 50
    storage.write("x", content)
    assert storage.read_range("x", 300, 1000) == content[300:1300]
    assert storage.read_range("x", 12_700, 1000) == content[12_700:]


PARTS = ((0, 1), (7, 4 * 2**20 - 1), (7, 4 * 2**20), (1, 9 * 2**20), (0, 10 * 2**20))


def test_parts_of_any_size_are_read(storage: Storage) -> None:
    content = random.Random(0).randbytes(10 * 2**20)
    storage.write("x", content)
    parts = storage.ranges("x")
    assert parts.num_bytes == len(content)
    for offset, size in PARTS:
        assert parts.read(offset, size) == content[offset : offset + size]


@pytest.mark.s3
def test_parts_of_an_object_that_shrank_or_vanished_are_errors(s3: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/{tmp_path.name}")
    storage.write("x", bytes(10 * 2**20))
    parts = storage.ranges("x")
    storage.write("x", bytes(5 * 2**20))
    with retry_limit(0.2), pytest.raises(OSError, match=r"cannot read .*short body"):
        parts.read(0, 9 * 2**20)
    storage.delete("x")
    with pytest.raises(FileNotFoundError, match=r"/x does not exist"):
        parts.read(0, 9 * 2**20)


def test_folders_of_any_depth_are_walked_once(storage: Storage) -> None:
    paths = [f"{i}/{j}/{k}.txt" for i in range(2) for j in range(18) for k in range(3)]
    paths += ["top.txt", "0/a.txt", "0/0/deep/er/x.txt", "a-b/x.txt", "a/x.txt", "a.b/x.txt"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: storage.write(path, b"1"), paths))
    assert sorted(path for path, _ in storage.walk()) == sorted(paths)
    assert [path for path, _ in storage.list("0/0")] == sorted(p for p in paths if p.startswith("0/0/"))


def test_a_created_file_appears_whole_or_not_at_all(storage: Storage) -> None:
    with storage.create("x") as file:
        file.write(b"one")
        assert not storage.exists("x")
        file.write(b"two")
    assert storage.read("x") == b"onetwo"
    with pytest.raises(TypeError), storage.create("x") as file:
        file.write(b"three") and file.write("four")  # type: ignore[arg-type]
    assert storage.read("x") == b"onetwo"
    assert [path for path, _ in storage.list()] == ["x"]


def test_parquet_is_read_in_place_and_a_pickle_still_reads(storage: Storage) -> None:
    with storage.create("t.parquet") as file:
        pq.write_table(pa.table({"x": [1, 2, 3]}), file)
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301
    with again.open_input("t.parquet") as source:
        assert pq.read_table(source)["x"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b", "./x"])
def test_no_path_leaves_the_place(storage: Storage, path: str) -> None:
    for act in (storage.read, storage.exists, storage.delete, storage.list, lambda p: storage.write(p, b"")):
        with pytest.raises(ValueError, match=r"would leave .*; try a relative path"):
            act(path)


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    storage, stop = open_storage(tmp_path), threading.Event()
    contents = {bytes([i]) * 300_000 for i in range(2)}
    storage.write("x", next(iter(contents)))

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write("x", content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(storage.read("x") in contents for _ in range(200))
    finally:
        stop.set()
        join(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_killed_writers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in (".x.parquet.123-0a1b2c3d.tmp", ".mine.tmp", "x.tmp", ".x"):
        (tmp_path / "a" / name).write_bytes(b"")
    open_storage(tmp_path).delete_temporaries()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".mine.tmp", ".x", "x.tmp"]


def test_links_out_of_the_root_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "root" / "in.txt").write_text("in")
    (tmp_path / "root" / "out.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "root" / "same.txt").symlink_to("in.txt")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    assert [path for path, _ in open_storage(tmp_path / "root").list()] == ["in.txt", "same.txt"]


def test_a_uri_is_absolute_and_says_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("x").uri == str(tmp_path / "x")
    assert open_storage(f"file://{tmp_path}/x%20y").uri == str(tmp_path / "x y")
    assert open_storage("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_storage("s3://bucket").join("c") == "s3://bucket/c"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "empty"),
        ("ftp://host/x", "cannot store at 'ftp://host/x'; try a folder"),
        ("s3://", "cannot store at"),
        ("s3://bucket/../x", "would leave"),
        ("s3://key:hunter2@bucket/x", "contains credentials"),
        ("s3://bucket/x?secret_key=hunter2", "contains credentials"),
    ],
)
def test_a_wrong_uri_is_refused_and_no_secret_repeated(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_storage(uri)
    assert "hunter2" not in str(caught.value)


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    root = os.geteuid() == 0
    if root:  # who may write everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"no permission to write .*; check the folder's owner"):
            open_storage(tmp_path).write("x", b"")
    finally:
        if root:
            os.seteuid(0)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*/file/x: a file stands where a folder should"):
        open_storage(tmp_path / "file").write("x", b"")


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write("x", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*/x: .*No space left"):
        storage.write("x", b"new")
    assert storage.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.s3
def test_wrong_credentials_are_named_without_the_secret(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret")
    # Another spelling of the same endpoint, since a process keeps one client an endpoint.
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"] + "/")
    for act in (lambda s: s.read("x"), lambda s: s.write("x", b""), lambda s: s.list()):
        with pytest.raises(PermissionError, match=r"no permission to .*; check the credentials") as caught:
            act(open_storage(f"{s3}/denied"))
        assert "wrongsecret" not in str(caught.value)


def test_what_vanishes_while_it_is_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write("a", b"x")
    storage.write("b", b"x")
    walk = os.walk

    def deleting(*arguments: Any, **named: Any) -> Iterator[Any]:
        for found in walk(*arguments, **named):
            (tmp_path / "b").unlink()
            yield found

    monkeypatch.setattr(os, "walk", deleting)
    assert storage.list() == [("a", 1)]


def test_a_folder_without_links_holds_what_was_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    storage = open_storage(tmp_path)
    assert storage.write_new("a", b"mine")
    assert not storage.write_new("a", b"theirs")
    assert storage.list() == [("a", 4)]


def test_a_file_is_named_by_a_path_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_of("a.png") == (open_storage(tmp_path), "a.png")
    assert storage_of("/a.png") == (open_storage("/"), "a.png")
    assert storage_of("s3://bucket/a.png") == (open_storage("s3://bucket"), "a.png")
    assert storage_of("s3://bucket/b/a.png") == (open_storage("s3://bucket/b"), "a.png")
    assert storage_of(f"file://{tmp_path}/b/a.png") == (open_storage(tmp_path / "b"), "a.png")
    for nameless in ("s3://bucket", "s3://bucket/b/"):
        with pytest.raises(ValueError, match="names no file"):
            storage_of(nameless)
