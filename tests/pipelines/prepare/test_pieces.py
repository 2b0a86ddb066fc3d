"""Neither the number of cores nor an earlier attempt changes a byte; every core has several tasks."""

import dataclasses
import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare as module
from pipelines.config import PrepareConfig
from pipelines.interrupts import Interrupted
from pipelines.prepare import SliceTasks, prepare
from pipelines.prepare.pieces import TASKS_PER_CORE, cut_pieces
from pipelines.prepare.quarantine import Quarantine
from pipelines.prepare.shards import write_slice

OPTIONS = PrepareConfig(rows_per_shard=50, rows_per_group=16, val_fraction=0.3, max_bad=1)


@pytest.mark.parametrize("cores", [2, 3, 16, 192])
@pytest.mark.parametrize("num_slices", [1, 2, 7, 16, 61, 177])
def test_every_core_has_four_tasks_and_the_last_ones_are_short(cores: int, num_slices: int) -> None:
    sizes = {number: 8192 - number % 2 for number in range(num_slices)}
    cut_up = cut_pieces(sizes, cores, {})
    num_tasks = sum(len(cut_up.get(number, [0])) for number in sizes)
    assert num_tasks >= min(TASKS_PER_CORE * cores, sum(sizes.values()) // 32)
    assert (num_slices - len(cut_up)) % cores == 0
    assert len(cut_up) < 2 * cores
    for number, pieces in cut_up.items():
        assert [i for piece in pieces for i in piece] == list(range(sizes[number]))
    longest = max(len(piece) for pieces in cut_up.values() for piece in pieces)
    assert longest <= max(32, sum(sizes[number] for number in cut_up) / (TASKS_PER_CORE * cores) + 1)


def test_one_core_and_tiny_slices_are_not_cut() -> None:
    assert cut_pieces({0: 8192, 1: 10}, 1, {}) == {}
    assert cut_pieces({0: 32, 1: 10}, 8, {}) == {}
    assert cut_pieces({}, 8, {}) == {}


def test_pieces_of_another_machine_are_used() -> None:
    done = {0: [range(30, 50), range(10)], 2: [range(40, 100)]}
    assert cut_pieces({0: 100, 2: 100}, 1, done) == {
        0: [range(10), range(10, 30), range(30, 50), range(50, 100)],
        2: [range(40), range(40, 100)],
    }
    assert cut_pieces({0: 100}, 4, done, min_images=5)[0] == [
        range(10), range(10, 17), range(17, 24), range(24, 30), range(30, 50), range(50, 57), range(57, 64),
        range(64, 70), range(70, 76), range(76, 82), range(82, 88), range(88, 94), range(94, 100),
    ]  # fmt: skip


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def source(few: Path, zoo: list, tmp_path: Path) -> Path:
    """300 small images and everything that may be wrong with one, some of it twice."""
    folder = tmp_path / "source"
    shutil.copytree(few, folder)
    for number, animal in enumerate(zoo):
        (folder / "train" / "bag" / f"{number}-{animal.name}").write_bytes(animal.content)
    for number, path in enumerate(sorted(few.rglob("*.png"))[::30]):
        shutil.copy(path, folder / "train" / "dress" / f"again-{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("options", [{}, {"hold_out": "stratified", "group_by": "^.{13}"}], ids=str)
def test_no_byte_depends_on_the_number_of_cores(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (source / "train" / "notes.txt").write_text("about the images")
    config = dataclasses.replace(OPTIONS, **options)
    tasks: dict[int, int] = {}

    def run(task: Any, rows: list[dict[str, Any]], cores: int) -> Any:
        tasks[cores] = tasks.get(cores, 0) + len(rows)
        return map(task, rows)

    monkeypatch.setattr("pipelines.prepare.passes.cut_pieces", partial(cut_pieces, min_images=3))
    for cores in (1, 3, 16):
        monkeypatch.setattr("pipelines.cluster.task_slots", lambda cores=cores: cores)
        monkeypatch.setattr("pipelines.prepare.passes._run_tasks", partial(run, cores=cores))
        manifest = prepare(str(source), str(tmp_path / str(cores)), config)
        assert manifest.splits.keys() == {"train", "val", "test"}
        assert sum(manifest.passed_over.values()) > 0
        parts = manifest.num_ok, manifest.num_quarantined, manifest.num_duplicates, *manifest.passed_over.values()
        assert manifest.num_found == sum(parts)
    assert tasks[1] < tasks[3] < tasks[16]
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") == files_of(tmp_path / "16")


@pytest.mark.usefixtures("without_ray")
def test_a_signal_is_answered_with_the_slices_and_pieces_that_are_done_and_none_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, int]] = []
    write = SliceTasks.write

    def interrupted(tasks: SliceTasks, row: dict[str, Any], after: int) -> dict[str, int]:
        if len(started) == after:
            raise Interrupted
        started.append((row["number"], row["start"]))
        return write(tasks, row)

    monkeypatch.setattr("pipelines.prepare.passes.cut_pieces", partial(cut_pieces, min_images=3))
    monkeypatch.setattr("pipelines.cluster.task_slots", lambda: 3)
    monkeypatch.setattr(SliceTasks, "write", lambda tasks, row: interrupted(tasks, row, after=7))
    with pytest.raises(Interrupted, match=r"^stopped with 3 of \d slices done, and 4 pieces of the others$"):
        prepare(str(source), str(tmp_path / "out"), OPTIONS)
    monkeypatch.setattr(SliceTasks, "write", lambda tasks, row: interrupted(tasks, row, after=-1))
    prepare(str(source), str(tmp_path / "out"), OPTIONS)
    assert len(started) == len(set(started))


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_dropping_duplicates_reads_only_these_again_and_writes_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.prepare.dropping.write_slice", lambda *arguments: pytest.fail("read everything"))
        first = prepare(str(source), str(tmp_path / "copied"), OPTIONS)
    assert first.num_duplicates >= 10

    def from_the_source(tasks: SliceTasks, row: dict[str, Any]) -> dict[str, int]:
        number = row["number"]
        part = tasks.work.slice(number)
        kept = write_slice(part, tasks.place, tasks.target, tasks.config, frozenset(row["skip"]))
        tasks.work.put(kept, again=True)
        for shard in {s.path for s in tasks.work.summary(number).shards} - {s.path for s in kept.shards}:
            tasks.target.delete(shard)
        return {"number": number, "num_bad": 0}

    with monkeypatch.context() as patch:
        patch.setattr(SliceTasks, "drop", from_the_source)
        assert prepare(str(source), str(tmp_path / "read"), OPTIONS) == first
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "read")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_slice_of_which_one_shard_was_rewritten_by_a_killed_task_is_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = prepare(str(source), str(tmp_path / "a"), OPTIONS)
    put = module.WorkFolder.put

    def dies(work: module.WorkFolder, summary: Any, *, again: bool = False) -> None:
        if again:
            raise KeyboardInterrupt
        put(work, summary)

    monkeypatch.setattr(module.WorkFolder, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), str(tmp_path / "b"), OPTIONS)
    monkeypatch.setattr(module.WorkFolder, "put", put)
    assert prepare(str(source), str(tmp_path / "b"), OPTIONS) == undisturbed
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_joined_quarantine_keeps_the_limit_of_all_heads() -> None:
    images = [bytes([i % 256]) * (2**16 + i) for i in range(300)]
    whole, joined = Quarantine(), Quarantine()
    for number, content in enumerate(images):
        whole.add(str(number), "bad: x", content)
    for start in (0, 100, 200):
        piece = Quarantine()
        for number in range(start, start + 100):
            piece.add(str(number), "bad: x", images[number])
        joined.extend([dict(zip(("source", "reason", "num_bytes", "head"), row)) for row in piece._rows])
    assert joined._rows == whole._rows
    assert joined.reasons == whole.reasons == {"bad": 300}
