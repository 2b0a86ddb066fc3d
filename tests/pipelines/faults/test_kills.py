"""`prepare` killed at random moments goes on from where it was; readers never see what is unfinished."""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import is_prepared, read_manifest
from pipelines.prepare import prepare
from pipelines.storage import open_storage
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, wait_until

OPTIONS: dict[str, Any] = {"rows_per_shard": 12, "rows_per_group": 5}
FLAGS = ["--rows-per-shard", "12", "--rows-per-group", "5"]
# Each slice takes a little longer, so that a kill may fall anywhere.
IN_ONE_PROCESS = """
import contextlib, functools, sys, time, types
sys.modules["pipelines.cluster"] = types.SimpleNamespace(
    ray_session=lambda compute: contextlib.nullcontext(), task_slots=lambda: cores
)
from pipelines.config import PrepareConfig
from pipelines.prepare import passes, prepare
def run(task, rows):
    for row in rows:
        yield task(row)
        time.sleep(0.01)
assert passes._run_tasks
passes._run_tasks = run
passes.cut_pieces = functools.partial(passes.cut_pieces, min_images=3)
prepare(source, out, PrepareConfig(**options))
"""
WITH_RAY = "import sys; from pipelines import cli; cli.main(sys.argv[1:])"
NUM_CORES = itertools.cycle([4, 1, 10])
SERVER = multiprocessing.get_context("forkserver")


def started(with_ray: bool, source: Path, out: Path) -> psutil.Process:
    """Start the job in another process; without Ray, in one that has already imported everything."""
    if with_ray:
        words = [sys.executable, "-c", WITH_RAY, "prepare", str(source), str(out), *FLAGS]
        with (out.parent / "log").open("ab") as log:
            return psutil.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    SERVER.set_forkserver_preload(["pipelines.prepare", "pipelines.prepare.shards"])
    # Some slices whole and some in pieces, and every time others: as if each start were on another machine.
    names = {"source": str(source), "out": str(out), "options": OPTIONS, "cores": next(NUM_CORES)}
    process = SERVER.Process(target=exec, args=(IN_ONE_PROCESS, names), daemon=True)
    process.start()
    return Watched(process)


class Watched(psutil.Process):
    """A process of multiprocessing with the manners of psutil.Popen."""

    def __init__(self, process: Any) -> None:
        self._started = process
        super().__init__(process.pid)

    def poll(self) -> int | None:
        return self._started.exitcode

    def wait(self, timeout: float | None = None) -> Any:
        self._started.join(timeout)
        if self._started.exitcode is None:
            raise psutil.TimeoutExpired(timeout or 0)
        return self._started.exitcode


@pytest.fixture
def source(few: Path, tmp_path: Path) -> Path:
    """300 images, eight of them once more."""
    folder = tmp_path / "source"
    for number, path in enumerate(sorted(few.rglob("*.png"))):
        names = [f"{number:03d}.png"] + ([f"{number}-again.png"] if number % 40 == 0 else [])
        for name in names:
            target = folder / path.relative_to(few).parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of everything in it, hidden files too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def num_files(out: Path) -> int:
    """Files and folders, as far as they stay while they are counted."""
    return sum(len(folders) + len(names) for _, folders, names in os.walk(out))


def has_files(out: Path, wanted: int) -> bool:
    return num_files(out) >= wanted


def wait_for_end_or(is_due: Callable[[], bool], job: Any) -> None:
    """Wait until the job has ended or the condition is met."""
    wait_until(lambda: job.poll() is not None or is_due(), "a moment to kill", JOB_DEADLINE_S, poll_every_s=0.002)


def check_readers(out: Path) -> bool:
    """Whether there is a dataset; if so, it is whole."""
    if not is_prepared(open_storage(out)):
        return False
    manifest, found = read_manifest(open_storage(out)), files_of(out)
    for split in manifest.splits.values():
        assert all(found[shard.path] == shard.sha256 for shard in split.shards)
    return True


def killed_until_done(with_ray: bool, source: Path, out: Path, chance: random.Random) -> int:
    """Restart the job until there is a dataset; return the number of kills.

    A kill falls when some files more are there (so that every start gets further, however slow the machine), or when
    the manifest is.
    """
    num_kills = 0
    while True:
        wanted = num_files(out) + chance.randint(1, 40)
        is_due = (out / "manifest.json").exists if chance.random() < 0.2 else partial(has_files, out, wanted)
        job: Any = started(with_ray, source, out)
        wait_for_end_or(is_due, job)
        with contextlib.suppress(psutil.TimeoutExpired):
            job.wait(chance.uniform(0.001, 0.02))
        if job.poll() is not None:
            assert job.poll() == 0, out.parent
            return num_kills
        # With all of its processes, as a lost machine would be.
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in job.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            job.kill()
        job.wait(KILLED_DEADLINE_S)
        num_kills += 1
        check_readers(out)


@pytest.mark.parametrize(
    ("with_ray", "min_kills"),
    [
        pytest.param(False, 5, marks=pytest.mark.slow, id="short"),
        pytest.param(False, 40, marks=pytest.mark.long, id="many"),
        pytest.param(True, 20, marks=[pytest.mark.long, pytest.mark.ray], id="ray"),
    ],
)
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    with_ray: bool, min_kills: int, source: Path, tmp_path: Path, without_ray: None
) -> None:
    undisturbed = prepare(str(source), str(tmp_path / "undisturbed"), PrepareConfig(**OPTIONS))
    assert (undisturbed.num_ok, undisturbed.num_duplicates) == (300, 8)
    seed = random.SystemRandom().randrange(2**32)
    chance, num_kills, rounds = random.Random(seed), 0, 0
    while num_kills < min_kills:
        out = tmp_path / f"round-{rounds}" / "out"
        out.parent.mkdir()
        num_kills += killed_until_done(with_ray, source, out, chance)
        assert check_readers(out)
        assert files_of(out) == files_of(tmp_path / "undisturbed"), f"seed {seed}, {num_kills} kills"
        rounds += 1


@pytest.mark.slow
def test_what_was_done_is_not_done_again(
    source: Path, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import prepare as module
    from pipelines.prepare import passes
    from pipelines.prepare.pieces import cut_pieces

    monkeypatch.setattr("pipelines.cluster.task_slots", lambda: 4)
    monkeypatch.setattr(passes, "cut_pieces", partial(cut_pieces, min_images=3))
    written: list[tuple[str, int, int]] = []

    def recorded(name: str, dies_after: int) -> Callable[[Any, dict[str, Any]], dict[str, int]]:
        task = getattr(module.SliceTasks, name)

        def run(tasks: module.SliceTasks, row: dict[str, Any]) -> dict[str, int]:
            if len(written) == dies_after:
                raise KeyboardInterrupt
            written.append((name, row["number"], row.get("start", 0)))
            return task(tasks, row)

        return run

    # Within the whole slices, the pieces, the joins and the second pass.
    for dies_after in (15, 25, 41, 45, 1000):
        with monkeypatch.context() as patch:
            for name in ("write", "join", "drop"):
                patch.setattr(module.SliceTasks, name, recorded(name, dies_after))
            ending = pytest.raises(KeyboardInterrupt) if dies_after < 1000 else contextlib.nullcontext()
            with ending:
                prepare(str(source), str(tmp_path / "out"), PrepareConfig(**OPTIONS))
        assert check_readers(tmp_path / "out") == (dies_after == 1000)
    assert len(written) == len(set(written))
    kinds = [name for name, *_ in written]
    assert kinds == sorted(kinds, key=("write", "join", "drop").index)
    assert kinds.count("join") > 1
    assert 1 <= kinds.count("drop") <= 8
