"""Whatever files are called and whatever stands in their place: decoded, quarantined or refused, and counted."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.storage import open_storage
from pipelines.storage import s3 as client
from pipelines.storage.listing import ListedFile

Png = Callable[[int], bytes]

NAMES = [
    b"new\nline.png", b"tab\t\x1b[31mred.png", b"x" * 251 + b".png", b"\xff\xfe bytes.png", b"d\xe9j\xe0/vu.png",
    b"a/b/c/d/e/f/g/h/i/j/deep.png", b" lead.png", b"-rf.png", b"quote\"'.png", b"back\\slash.png", b"100%25.png",
    b"a#b?c.png", b"*.png", "e\u0301.png".encode(), "\u00e9.png".encode(), "\u202egnp.png".encode(), b"UPPER.PNG",
    b"a;b&c|d.png", b"{x}.png", b"file:.png", b"s3:.png", b"~/home.png", b"~.png", b"train.png",
]  # fmt: skip


def written(folder: Path, png: Png) -> Path:
    for number, name in enumerate(NAMES):
        path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118 -- paths are of bytes here
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        Path(os.fsdecode(path)).write_bytes(png(number))
    return folder


def quarantined(out: Path) -> dict[str, str]:
    storage = open_storage(out)
    files = [storage.open_input(path) for path, _ in storage.list("quarantine")]
    return {row["source"]: row["reason"] for file in files for row in pq.read_table(file).to_pylist()}


def test_names_of_every_kind_are_read(png: Png, prepared: Callable, tmp_path: Path) -> None:
    manifest, rows = prepared(written(tmp_path / "s", png))
    assert sorted(row["image"] for row in rows["train"]) == sorted(map(png, range(len(NAMES))))
    assert manifest.num_ok == manifest.num_found == len(NAMES)


def test_a_class_whose_name_is_no_utf8_has_one_that_is(png: Png, prepared: Callable, tmp_path: Path) -> None:
    for number, name in enumerate((b"caf\xe9", b"caf\xe8", b"tea")):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"s", name)))  # noqa: PTH118
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(png(number))
    manifest, _ = prepared(tmp_path / "s")
    assert manifest.classes == ["caf\\udce8", "caf\\udce9", "tea"]


def test_what_is_no_file_is_quarantined_and_never_opened(
    png: Png, prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "s"
    (source / "empty").mkdir(parents=True)
    (source / "folder.png").mkdir()
    (source / "whole.png").write_bytes(png(0))
    (tmp_path / "outside.png").write_bytes(png(1))
    os.mkfifo(source / "pipe.png")
    monkeypatch.chdir(source)  # a socket's path may be 107 bytes long
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.png")
    with (source / "huge.png").open("wb") as file:
        file.truncate(10**12)
    for name, target in {
        "loop": "loop.png",
        "gone": "absent.png",
        "out": "../outside.png",
        "same": "whole.png",
    }.items():
        (source / f"{name}.png").symlink_to(target)
    (source / "up").symlink_to("..")
    (source / "self").symlink_to(".")
    expected = {
        "pipe.png": "no regular file", "socket.png": "no regular file", "loop.png": "broken link",
        "gone.png": "broken link", "out.png": "link that leaves the folder",
        "huge.png": "too many bytes: 1000000000000 is more than 268435456; cut it into smaller files",
    }  # fmt: skip
    if os.geteuid() == 0:
        os.mknod(source / "zero.png", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        expected["zero.png"] = "no regular file"
    manifest, rows = prepared(source, max_bad=1, max_skipped=1)
    listener.close()
    assert quarantined(tmp_path / "out") == expected
    assert [row["image"] for row in rows["train"]] == [png(0)]
    assert (manifest.num_found, manifest.num_ok, manifest.num_duplicates) == (4 + len(expected), 1, 1)
    assert manifest.passed_over == {"links to folders": 2}
    assert manifest.num_quarantined == len(expected)
    assert not (tmp_path / "out/quarantine/part-00002.parquet").exists(), "a file that is not read makes no slices"
    assert "passed over 2: 2 links to folders, such as " in caplog.text


def test_a_list_may_not_make_us_wait_for_a_pipe_or_read_a_device(png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "ok.png").write_bytes(png(0))
    (tmp_path / "link.png").symlink_to("ok.png")
    os.mkfifo(tmp_path / "pipe.png")
    lines = ["uri", "ok.png", "pipe.png", str(tmp_path / "pipe.png"), "/dev/zero", "link.png", str(tmp_path)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    manifest, _ = prepared(tmp_path / "list.csv", max_bad=1)
    assert manifest.quarantine_reasons == {"no regular file": 4}
    assert (manifest.num_found, manifest.num_ok, manifest.num_duplicates) == (6, 1, 1)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_pipe_in_place_of_an_archive_is_refused(name: str, tmp_path: Path, prepared: Callable) -> None:
    (tmp_path / "s").mkdir()
    os.mkfifo(tmp_path / "s" / name)
    for source in (tmp_path / "s", tmp_path / "s" / name):
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(no regular file\)"):
            prepared(source)


def test_a_place_within_the_source_is_refused(png: Png, prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "s.png").write_bytes(png(0))
    (tmp_path / "again").symlink_to(tmp_path)
    for source in (tmp_path, tmp_path / "again"):
        with pytest.raises(ValueError, match=r"/out is inside the source .*; choose a folder outside it"):
            prepared(source)
    assert not (tmp_path / "out").exists()


def test_what_is_said_of_a_name_does_nothing_to_a_terminal(
    tmp_path: Path, without_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    for name in ("\x1b[2J.png", "a\nb.png", "\udcff.png", "\u202e.png"):
        (tmp_path / "s" / name).write_bytes(b"no image")
    (tmp_path / "s" / "x.png").symlink_to(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["prepare", str(tmp_path / "s"), str(tmp_path / "out"), "--max-bad", "0", "--max-skipped", "1"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip().isprintable()


KEYS = ["../up.png", "a/../b.png", "a//b.png", "./c.png", "/abs.png", "x\0y.png", "a/./d.png", "..", "folder/"]


def test_keys_that_are_no_paths_are_quarantined_without_a_request(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> bytes:
        raise AssertionError(f"asked for {arguments}")

    pages = [ListedFile(f"bucket/source/{key}", 70) for key in KEYS]
    monkeypatch.setattr(client, "walk", lambda prefix: iter(pages))
    monkeypatch.setattr(client, "read", refused)
    monkeypatch.setattr("pipelines.storage.Storage.exists", lambda self, path="": not path)
    monkeypatch.setattr("pipelines.storage.Storage.is_folder", lambda self, path: False)
    with pytest.raises(ValueError, match=r"no readable image among the 7 files of s3://bucket/source \(7 unsafe name"):
        prepared("s3://bucket/source", max_bad=1, max_skipped=1)


@pytest.mark.s3
def test_keys_of_every_kind_that_a_store_takes_are_read(png: Png, prepared: Callable, tmp_path: Path, s3: str) -> None:
    storage = open_storage(f"{s3}/{tmp_path.name}")
    names = ["new\nline.png", "k" * 250 + ".png", "100%.png", "100%25.png", "a b+c.png", "a#b?c.png", "a=b&c.png",
             "naïve/ümläut.png", "e\u0301.png", "colon:.png", "*.png", "\x7f.png", "sp /x.png", "s3:.png"]  # fmt: skip
    for number, name in enumerate(names):
        storage.write(name, png(number))
    storage.write("folder.png/x.png", png(len(names)))  # and so a key `folder.png/`, which is no image
    manifest, rows = prepared(storage.uri)
    assert sorted(row["image"] for row in rows["train"]) == sorted(map(png, range(len(names) + 1)))
    assert manifest.num_found == len(names) + 1
