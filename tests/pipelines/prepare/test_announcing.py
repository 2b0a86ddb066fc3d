"""Slices prepared in the order of a first epoch are announced once they are final, with the bytes of two passes."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.errors import UserError
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest
from pipelines.prepare import Preparation, SliceTasks, begin, prepare
from pipelines.prepare.announcing import (
    RayTaskPool,
    SeenDigests,
    SlicePlace,
    Stopped,
    first_epoch_order,
    num_trained_on,
)
from pipelines.prepare.duplicates import duplicates
from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, SliceSummary
from pipelines.sources import SPLITS
from pipelines.storage import open_storage

SMALL = PrepareConfig(rows_per_shard=24, rows_per_group=8, max_bad=0.2)


class OutOfOrder:
    """Runs tasks in this process, of several that were started one in turn."""

    def __init__(self, tasks: SliceTasks, limit: int = 5) -> None:
        self._tasks, self._limit = tasks, limit
        self._started: list[tuple[str, dict[str, Any]]] = []
        self._num_run = 0

    @property
    def is_full(self) -> bool:
        return len(self._started) >= self._limit

    def start(self, name: str, row: dict[str, Any]) -> None:
        self._started.append((name, row))

    def finished(self, timeout_s: float) -> list[tuple[str, dict[str, int]]]:
        self._num_run += 1
        name, row = self._started.pop(self._num_run % len(self._started))
        return [(name, getattr(self._tasks, name)(row))]


@pytest.fixture
def source(few: Path, tmp_path: Path) -> Path:
    """Copy `few`, with copies of images in other splits, slices and in the same one, and some that are broken."""
    folder = tmp_path / "source"
    shutil.copytree(few, folder)
    train = sorted((folder / "train" / "bag").iterdir())
    for number, path in enumerate(train[::5]):
        shutil.copy(path, folder / "train" / "dress" / f"copy-{number:03d}.png")
    shutil.copy(train[1], folder / "test" / "bag" / "copy.png")
    for number in range(4):
        (folder / "train" / "sneaker" / f"broken-{number}.png").write_bytes(train[0].read_bytes()[: 50 + number])
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    storage = open_storage(folder)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list()}


def in_order(
    source: Path,
    out: Path,
    is_stopped: Callable[[int], bool] = lambda num_announced: False,
    pool: Callable[[SliceTasks], Any] = OutOfOrder,
) -> tuple[list[tuple[str, int, str]], Manifest | None]:
    """Prepare in order; return path, rows and bytes of the training shards as announced, and the manifest."""
    begun = begin(str(source), str(out), SMALL)
    assert isinstance(begun, Preparation)
    announced: list[tuple[str, int, str]] = []

    def announce(summary: SliceSummary, num_done: int, num_slices: int) -> None:
        assert num_slices == len(begun.parts)
        for shard in summary.shards:
            digest = hashlib.sha256((out / shard.path).read_bytes()).hexdigest()
            assert digest == shard.sha256
            if shard.split == "train":
                announced.append((shard.path, shard.num_rows, digest))

    try:
        found = begun.write_in_order(announce, lambda: is_stopped(len(announced)), pool(begun.tasks))
    except Stopped:
        return announced, None
    return announced, begun.commit(found)


def train_shards(manifest: Manifest) -> list[tuple[str, int, str]]:
    return [(shard.path, shard.num_rows, shard.sha256) for shard in manifest.splits["train"].shards]


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_the_dataset_is_that_of_two_passes_and_every_shard_was_announced_as_it_stays(
    source: Path, tmp_path: Path
) -> None:
    expected = prepare(str(source), str(tmp_path / "plain"), SMALL)
    assert expected.num_duplicates > 10
    assert expected.num_quarantined == 4
    announced, manifest = in_order(source, tmp_path / "ordered")
    assert manifest == expected
    assert announced == train_shards(expected)
    assert bytes_of(tmp_path / "ordered") == bytes_of(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("num_announced", [0, 1, 4])
def test_stopped_anywhere_it_continues_in_either_way_to_the_same_bytes(
    source: Path, tmp_path: Path, num_announced: int
) -> None:
    expected = prepare(str(source), str(tmp_path / "plain"), SMALL)
    early, nothing = in_order(source, tmp_path / "ordered", lambda count: count >= num_announced)
    assert nothing is None
    assert early == train_shards(expected)[: len(early)]
    assert len(early) < len(train_shards(expected)), "it was stopped too late to mean anything"
    shutil.copytree(tmp_path / "ordered", tmp_path / "copy")
    announced, manifest = in_order(source, tmp_path / "ordered")
    assert (announced, manifest) == (train_shards(expected), expected)
    assert prepare(str(source), str(tmp_path / "copy"), SMALL) == expected
    for name in ("ordered", "copy"):
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "plain")


@pytest.mark.ray
@pytest.mark.usefixtures("ray4")
def test_ray_tasks_do_the_same_without_a_warning(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    announced, manifest = in_order(source, tmp_path / "ordered", pool=lambda tasks: RayTaskPool(tasks, 3, 0))
    assert manifest is not None
    assert announced == train_shards(manifest)
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray4")
def test_the_error_of_a_task_is_that_of_the_preparation(source: Path, tmp_path: Path) -> None:
    def gone(tasks: SliceTasks) -> RayTaskPool:
        shutil.rmtree(source / "train")
        return RayTaskPool(tasks, 3, 0)

    with pytest.raises((FileNotFoundError, UserError)):
        in_order(source, tmp_path / "ordered", pool=gone)


def test_slices_of_test_and_val_come_before_those_of_train() -> None:
    folders = ["train", "train", "val", "test", "test"]
    parts = [SlicePlace(num_entries=10, folder=folder, holds_out=False) for folder in folders]
    assert first_epoch_order(parts) == [3, 4, 2, 0, 1]
    assert num_trained_on(parts, 0.1) == (20, 20)
    parts = [SlicePlace(num_entries=10, folder="", holds_out=True)] * 2
    assert num_trained_on(parts, 0.1) == (20, 18)


slices = st.lists(st.lists(st.integers(-1, 12), min_size=1, max_size=12), min_size=1, max_size=8)


def summary_of(number: int, contents: list[int]) -> SliceSummary:
    """Summarise a slice whose images have these contents, -1 for one that cannot be read."""
    digests = b"".join(hashlib.sha256(bytes([max(0, content)])).digest()[:DIGEST_BYTES] for content in contents)
    splits = bytearray(NO_SPLIT if content < 0 else SPLITS.index("train") for content in contents)
    return SliceSummary(number=number, num_entries=len(contents), splits=splits, digests=bytearray(digests))


@given(slices)
def test_duplicates_are_those_that_all_summaries_show(contents: list[list[int]]) -> None:
    summaries = [summary_of(number, slice) for number, slice in enumerate(contents)]
    seen = SeenDigests()
    found = {summary.number: positions for summary in summaries if (positions := seen.add(summary))}
    expected = duplicates(lambda: summaries, sum(map(len, contents)))
    assert found == {number: sorted(positions) for number, positions in expected.items()}
