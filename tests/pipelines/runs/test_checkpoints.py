"""Our store is the only commit record: a checkpoint is whole or it is none, whatever happened while it was written."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from pipelines.runs.checkpoints import Checkpoint, CheckpointStore, Retention
from pipelines.storage import Storage, open_storage

FILES = ("model.safetensors", "optimizer.safetensors")
ONE, TWO, THREE = Retention(newest=1), Retention(newest=2), Retention(newest=3)


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


def checkpoint(step: int, loss: float | None = None) -> Checkpoint:
    return Checkpoint(
        step=step,
        files={name: f"{name} after {step}".encode() * 100 for name in FILES},
        meta={"steps_per_epoch": 7, "last": {} if loss is None else {"train/loss": loss}},
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(open_storage(tmp_path))


def folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / "checkpoints" / f"step-{step:010d}"


def file_of(tmp_path: Path, step: int, name: str) -> Path:
    """Return the path of the file that the manifest names."""
    manifest = json.loads((folder(tmp_path, step) / "manifest.json").read_text())
    return folder(tmp_path, step) / manifest["files"][name]["path"]


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_what_is_loaded_is_what_was_saved(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.latest_step() == 0
    store.save(checkpoint(5), TWO)
    assert store.latest() == checkpoint(5)
    assert store.load(5) == checkpoint(5)
    assert store.meta(5) == checkpoint(5).meta
    assert store.latest_step() == 5


def test_only_the_newest_are_kept_and_no_empty_folder(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        store.save(checkpoint(step), TWO)
    assert store.steps() == [3, 10]
    assert folders(tmp_path) == ["step-0000000003", "step-0000000010"]


def test_the_best_and_those_of_every_so_many_steps_are_kept_too(store: CheckpointStore) -> None:
    policy = Retention(newest=1, best=2, every_steps=4)
    for step, loss in enumerate([0.5, 0.2, 0.9, 0.7, 0.1, None, 0.8, float("nan"), 0.6], 1):
        store.save(checkpoint(step, loss), policy)
    assert store.steps() == [2, 4, 5, 8, 9]
    # A driver that starts again knows the losses from the manifests alone.
    again = CheckpointStore(store._storage)
    again.save(checkpoint(10, 0.15), policy)
    assert again.steps() == [4, 5, 8, 10]


def test_a_score_on_held_out_images_decides_before_training_losses_do(store: CheckpointStore) -> None:
    policy, scores = Retention(newest=1, best=1), {1: 60.0, 2: 90.0, 4: 80.0}
    for step, loss in enumerate([0.5, 0.4, 0.1, 0.2, 0.3], 1):
        store.save(checkpoint(step, loss), policy)
        if step in scores:
            store.record_score(step, scores[step])
    store.record_score(7, 99.0)
    assert store.steps() == [2, 5]
    again = CheckpointStore(store._storage)
    again.save(checkpoint(6, 0.0), policy)
    assert again.steps() == [2, 6]
    assert again.load(2).step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "emptied", "one bit flipped", "deleted"])
def test_a_damaged_newest_is_passed_over_and_named(
    store: CheckpointStore, tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(checkpoint(5), THREE)
    store.save(checkpoint(6), THREE)
    path = file_of(tmp_path, 6, name)
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        flipped = content[:40] + bytes([content[40] ^ 1]) + content[41:]
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "one bit flipped": flipped}[how])
    with caplog.at_level(logging.WARNING):
        assert store.latest() == checkpoint(5)
    assert "step 6 is skipped" in caplog.text
    assert path.name in caplog.text
    with pytest.raises(ValueError, match=rf"step-0000000006/{path.name} is (missing|damaged)"):
        store.load(6)
    # The run goes on from step 5 and comes to step 6 again.
    store.save(checkpoint(6), THREE)
    assert store.latest() == checkpoint(6)


class Counting(Storage):
    """Notes the name of every file that is read."""

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        READ.append(path.rsplit("/", 1)[-1])
        return super().read(path, max_bytes)


READ: list[str] = []


@pytest.fixture
def counting(store: CheckpointStore, tmp_path: Path) -> CheckpointStore:
    """Return a store of two checkpoints that counts reads."""
    for step in (5, 6):
        store.save(checkpoint(step), THREE)
    READ.clear()
    return CheckpointStore(Counting(str(tmp_path)))


def test_the_newest_checkpoint_is_loaded_with_one_read_of_each_file(counting: CheckpointStore, tmp_path: Path) -> None:
    assert counting.latest() == checkpoint(6)
    assert sorted(READ) == sorted(["manifest.json", *(file_of(tmp_path, 6, name).name for name in FILES)])


def test_the_newest_step_is_found_without_reading_any_file_but_its_manifest(counting: CheckpointStore) -> None:
    assert counting.latest_step() == 6
    assert READ == ["manifest.json"]


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_the_newest_step_is_one_whose_files_are_complete(
    counting: CheckpointStore, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(tmp_path, 6, FILES[1])
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert counting.latest_step() == 5
    assert READ == ["manifest.json"] * 2
    assert "step 6 is skipped" in caplog.text
    assert path.name in caplog.text


def test_only_contents_tell_that_a_bit_has_flipped_and_a_discarded_checkpoint_is_committed_anew(
    counting: CheckpointStore, tmp_path: Path
) -> None:
    path = file_of(tmp_path, 6, FILES[1])
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert counting.latest_step() == 6
    assert counting.latest_intact_step() == 5
    counting.discard(6)
    assert counting.latest_step() == 5
    counting.save(checkpoint(6), THREE)
    assert counting.latest() == checkpoint(6)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"files": 3, "meta": {}}'])
def test_a_manifest_that_says_nothing_makes_no_checkpoint(
    store: CheckpointStore, tmp_path: Path, content: bytes
) -> None:
    store.save(checkpoint(5), THREE)
    store.save(checkpoint(6), THREE)
    (folder(tmp_path, 6) / "manifest.json").write_bytes(content)
    assert store.latest() == checkpoint(5)
    store.save(checkpoint(6), THREE)
    assert store.latest() == checkpoint(6)


def test_leftovers_without_a_manifest_are_never_mixed_in_and_go_in_time(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(checkpoint(5), THREE)
    for step in (9, 11):
        folder(tmp_path, step).mkdir()
        (folder(tmp_path, step) / FILES[0]).write_bytes(b"of a dead attempt")
        (folder(tmp_path, step) / ".model.safetensors.1-ab.tmp").write_bytes(b"of a killed one")
    (tmp_path / "checkpoints" / "step-abc").mkdir()
    (tmp_path / "checkpoints" / "step-abc" / "manifest.json").write_bytes(b"{}")
    assert store.steps() == [5]
    assert store.latest() == checkpoint(5)
    store.save(checkpoint(9), THREE)
    assert store.load(9) == checkpoint(9)
    store.save(checkpoint(12), THREE)
    assert folders(tmp_path) == ["step-0000000005", "step-0000000009", "step-0000000012", "step-abc"]


def test_of_two_drivers_that_commit_the_same_step_one_wins(store: CheckpointStore, tmp_path: Path) -> None:
    other = Checkpoint(step=5, files=dict.fromkeys(FILES, b"of a zombie"), meta={"last": {}})
    store.save(checkpoint(5), THREE)
    CheckpointStore(open_storage(tmp_path)).save(other, THREE)
    assert store.latest() == checkpoint(5)


def mortal(tmp_path: Path, stop_at: int) -> Storage:
    """Return a storage whose process is killed before or after its `stop_at`th write or delete."""
    count = 0

    def pass_by(path: str) -> None:
        nonlocal count
        if count == stop_at:
            raise Killed(path)
        count += 1

    class Mortal(Storage):
        def write(self, path: str, content: bytes) -> None:
            pass_by(path)
            super().write(path, content)
            pass_by(path)

        def write_new(self, path: str, content: bytes) -> bool:
            pass_by(path)
            is_ours = super().write_new(path, content)
            pass_by(path)
            return is_ours

        def delete(self, path: str) -> None:
            pass_by(path)
            super().delete(path)
            pass_by(path)

        @contextmanager
        def create(self, path: str) -> Iterator[IO[bytes]]:
            pass_by(path)
            with super().create(path) as file:
                yield file
            pass_by(path)

    return Mortal(str(tmp_path))


@pytest.mark.parametrize("stop_at", range(8))
def test_a_process_killed_between_any_two_writes_leaves_a_whole_checkpoint(tmp_path: Path, stop_at: int) -> None:
    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), ONE)
    with pytest.raises(Killed):
        CheckpointStore(mortal(tmp_path, stop_at)).save(checkpoint(6), ONE)
    store = CheckpointStore(open_storage(tmp_path))
    left = store.latest()
    assert left in (checkpoint(5), checkpoint(6))
    # Four passes: both files before and after. One more: before the manifest. From then on it counts.
    assert left == checkpoint(5 if stop_at < 5 else 6)
    for step in (6, 7):
        store.save(checkpoint(step), ONE)
    assert store.latest() == checkpoint(7)
    assert folders(tmp_path) == ["step-0000000007"]


def test_the_list_of_kills_above_covers_every_write(tmp_path: Path) -> None:
    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), ONE)
    CheckpointStore(mortal(tmp_path, 8)).save(checkpoint(6), ONE)
    assert CheckpointStore(open_storage(tmp_path)).latest() == checkpoint(6)
    assert folders(tmp_path) == ["step-0000000006"]


def test_a_storage_that_refuses_leaves_the_checkpoint_before_and_no_temporary_file(tmp_path: Path) -> None:
    class Full(Storage):
        @contextmanager
        def create(self, path: str) -> Iterator[IO[bytes]]:
            with super().create(path) as file:
                yield file
                if path.rsplit("/", 1)[-1].startswith("optimizer"):
                    raise OSError(28, "No space left on device")

    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), ONE)
    with pytest.raises(OSError, match=r"cannot write .*optimizer.*No space left"):
        CheckpointStore(Full(str(tmp_path))).save(checkpoint(6), ONE)
    assert CheckpointStore(open_storage(tmp_path)).latest() == checkpoint(5)
    assert not list(tmp_path.rglob(".*"))


def test_a_storage_that_refuses_to_remove_costs_nothing_and_the_next_commit_removes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(Storage):
        def delete(self, path: str) -> None:
            raise OSError(f"cannot delete {path}")

    for step in (5, 6):
        CheckpointStore(Stubborn(str(tmp_path))).save(checkpoint(step), ONE)
    assert "retrying at the next one: cannot delete" in caplog.text
    store = CheckpointStore(open_storage(tmp_path))
    assert store.steps() == [5, 6]
    assert store.latest() == checkpoint(6)
    store.save(checkpoint(7), ONE)
    assert folders(tmp_path) == ["step-0000000007"]


def test_the_manifest_is_written_last_and_names_every_sha256(tmp_path: Path) -> None:
    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), ONE)
    said = json.loads((folder(tmp_path, 5) / "manifest.json").read_text())
    assert set(said) == {"step", "meta", "files"}
    assert set(said["files"]) == set(FILES)
    for name, entry in said["files"].items():
        assert entry["path"] == f"{name.removesuffix('.safetensors')}-{entry['sha256'][:16]}.safetensors"
        assert entry["bytes"] == len(checkpoint(5).files[name])
