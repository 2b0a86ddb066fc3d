"""An image that changes while its preparation is interrupted is read again, whatever its size says."""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import prepare as module
from pipelines.config import PrepareConfig
from pipelines.sources.entry import Entry
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import Storage, open_storage

with closing(SortedEntries(Entry(f"{number:02d}.bmp", f"{number:02d}.bmp") for number in range(30))) as _entries:
    NAMES = [entry.name for entry in _entries]
    """In the order of storage."""
CONFIG = PrepareConfig(rows_per_shard=5, rows_per_group=2, max_bad=1, val_fraction=0.2)
KillAfter = Callable[[int], list[int]]


def bitmap(number: int) -> bytes:
    """Of one size whatever the pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, "BMP")
    return file.getvalue()


def files_of(storage: Storage) -> dict[str, str]:
    """sha256 of every file, hidden ones too on a disk."""
    if storage.is_local:
        paths = [str(path.relative_to(storage.uri)) for path in Path(storage.uri).rglob("*") if path.is_file()]
    else:
        paths = [path for path, _ in storage.list()]
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path in paths}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path, without_ray: None) -> str:
    return str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def put(root: str) -> Callable[[str, bytes], None]:
    """Return a function that writes an image of the source, each with a later modification time than the one before."""
    storage, ticks = open_storage(f"{root}/source"), iter(range(10**18, 2 * 10**18, 10**9))

    def write(name: str, content: bytes) -> None:
        storage.write(name, content)
        if storage.is_local:
            os.utime(storage.join(name), ns=(0, next(ticks)))

    for number in range(30):
        write(NAMES[number], bitmap(number))
    write(NAMES[3], b"x" * len(bitmap(0)))
    write(NAMES[27], bitmap(6))  # the copy of an image of another slice
    return write


@pytest.fixture
def killed(root: str, monkeypatch: pytest.MonkeyPatch) -> KillAfter:
    """Return a function that interrupts a preparation after some slices, and returns what the next one writes."""
    written, limits = list[int](), list[int]()

    def counted(task: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
        def counting(tasks: module.SliceTasks, row: dict[str, Any]) -> dict[str, int]:
            if limits and len(written) == limits[0]:
                raise KeyboardInterrupt
            written.append(row["number"])
            return task(tasks, row)

        return counting

    for name in ("write", "drop"):
        monkeypatch.setattr(module.SliceTasks, name, counted(getattr(module.SliceTasks, name)))

    def kill_after(count: int) -> list[int]:
        limits.append(count)
        with pytest.raises(KeyboardInterrupt):
            module.prepare(f"{root}/source", f"{root}/out", CONFIG)
        limits.clear()
        written.clear()
        return written

    return kill_after


def is_as_if_fresh(root: str) -> bool:
    module.prepare(f"{root}/source", f"{root}/out", CONFIG)
    module.prepare(f"{root}/source", f"{root}/fresh", CONFIG)
    return files_of(open_storage(f"{root}/out")) == files_of(open_storage(f"{root}/fresh"))


def test_only_the_slice_of_a_changed_image_is_written_again(root: str, put: Any, killed: KillAfter) -> None:
    written = killed(4)
    put(NAMES[7], bitmap(100))
    module.prepare(f"{root}/source", f"{root}/out", CONFIG)
    assert sorted(set(written)) == [1, 4, 5]
    assert is_as_if_fresh(root)


def test_a_bad_image_that_was_mended_leaves_no_quarantine(root: str, put: Any, killed: KillAfter) -> None:
    killed(5)
    assert open_storage(f"{root}/out").exists("quarantine/part-00000.parquet")
    put(NAMES[3], bitmap(3))
    assert is_as_if_fresh(root)
    assert not open_storage(f"{root}/out").exists("quarantine/part-00000.parquet")


@pytest.mark.parametrize("changed", [6, 27, 29])
def test_a_change_after_duplicates_were_dropped_brings_back_what_is_none_now(
    changed: int, root: str, put: Any, killed: KillAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = killed(6)
    # The slice with the copy is written again without it, and its summary never is.
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.prepare.workfolder.WorkFolder.put", lambda *rest, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.prepare(f"{root}/source", f"{root}/out", CONFIG)
    assert written == [5]
    put(NAMES[changed], bitmap(100))
    assert is_as_if_fresh(root)


def test_times_of_files_are_no_part_of_the_dataset(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "source").mkdir()
    for number in range(12):
        (tmp_path / f"source/{number}.bmp").write_bytes(bitmap(number))
    first = module.prepare(str(tmp_path / "source"), str(tmp_path / "a"), CONFIG)
    for path in (tmp_path / "source").iterdir():
        os.utime(path)
    assert module.prepare(str(tmp_path / "source"), str(tmp_path / "a"), CONFIG) == first
    assert module.prepare(str(tmp_path / "source"), str(tmp_path / "b"), CONFIG) == first
