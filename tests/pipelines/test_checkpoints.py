"""Our store is the only commit record: a checkpoint is whole or it is none, whatever happened while it was written."""

import json
import logging
from pathlib import Path

import pytest

from pipelines.checkpoints import Checkpoint, CheckpointStore
from pipelines.storage import Storage, open_storage

FILES = ("model.safetensors", "optimizer.safetensors")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step, files={name: f"{name} after {step}".encode() * 100 for name in FILES}, meta={"steps_per_epoch": 7}
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(open_storage(tmp_path))


def folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / "checkpoints" / f"step-{step:010d}"


def test_what_is_loaded_is_what_was_saved(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.latest_step() == 0
    store.save(checkpoint(5), keep=2)
    assert store.latest() == checkpoint(5)
    assert store.load(5) == checkpoint(5)
    assert store.latest_step() == 5


def test_only_the_newest_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        store.save(checkpoint(step), keep=2)
    assert store.steps() == [3, 10]
    assert sorted(p.parent.name for p in tmp_path.rglob("*.json")) == ["step-0000000003", "step-0000000010"]
    assert not list(folder(tmp_path, 1).glob("*"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "emptied", "one bit flipped", "deleted"])
def test_a_damaged_newest_is_passed_over_and_named(
    store: CheckpointStore, tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(checkpoint(5), keep=3)
    store.save(checkpoint(6), keep=3)
    path = folder(tmp_path, 6) / name
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        flipped = content[:40] + bytes([content[40] ^ 1]) + content[41:]
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "one bit flipped": flipped}[how])
    with caplog.at_level(logging.WARNING):
        assert store.latest() == checkpoint(5)
    assert "step 6 is passed over" in caplog.text
    assert name in caplog.text
    with pytest.raises(ValueError, match=rf"step-0000000006/{name} is (missing|damaged)"):
        store.load(6)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"sha256": 3, "meta": {}}'])
def test_a_manifest_that_says_nothing_makes_no_checkpoint(
    store: CheckpointStore, tmp_path: Path, content: bytes
) -> None:
    store.save(checkpoint(5), keep=3)
    store.save(checkpoint(6), keep=3)
    (folder(tmp_path, 6) / "manifest.json").write_bytes(content)
    assert store.latest() == checkpoint(5)


def test_leftovers_without_a_manifest_are_ignored_and_never_mixed_in(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(checkpoint(5), keep=3)
    folder(tmp_path, 9).mkdir()
    (folder(tmp_path, 9) / FILES[0]).write_bytes(b"of a dead attempt")
    (folder(tmp_path, 9) / "ema.safetensors").write_bytes(b"of a dead attempt")
    (tmp_path / "checkpoints" / "step-abc").mkdir()
    (tmp_path / "checkpoints" / "step-abc" / "manifest.json").write_bytes(b"{}")
    assert store.steps() == [5]
    assert store.latest() == checkpoint(5)
    store.save(checkpoint(9), keep=3)
    assert store.load(9) == checkpoint(9)


@pytest.mark.parametrize("stop_at", range(3))
def test_a_process_killed_between_two_files_leaves_the_checkpoint_before(tmp_path: Path, stop_at: int) -> None:
    class Killed(BaseException):
        """What nothing catches, as nothing catches SIGKILL."""

    class Mortal(Storage):
        def write(self, path: str, content: bytes) -> None:
            if len(written) == stop_at:
                raise Killed
            written.append(path)
            super().write(path, content)

    written: list[str] = []
    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), keep=1)
    with pytest.raises(Killed):
        CheckpointStore(Mortal(str(tmp_path))).save(checkpoint(6), keep=1)
    store = CheckpointStore(open_storage(tmp_path))
    assert store.latest() == checkpoint(5)
    store.save(checkpoint(6), keep=1)
    assert store.steps() == [6]


def test_a_process_killed_while_it_deletes_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    class Killed(BaseException):
        """As above."""

    class Mortal(Storage):
        def delete(self, path: str) -> None:
            super().delete(path)
            raise Killed

    CheckpointStore(open_storage(tmp_path)).save(checkpoint(5), keep=1)
    with pytest.raises(Killed):
        CheckpointStore(Mortal(str(tmp_path))).save(checkpoint(6), keep=1)
    store = CheckpointStore(open_storage(tmp_path))
    assert store.steps() == [6]
    assert store.latest() == checkpoint(6)


def test_the_manifest_is_written_last_and_holds_no_pickle(tmp_path: Path) -> None:
    order: list[str] = []

    class Watched(Storage):
        def write(self, path: str, content: bytes) -> None:
            order.append(path.rsplit("/", 1)[-1])
            super().write(path, content)

    CheckpointStore(Watched(str(tmp_path))).save(checkpoint(5), keep=1)
    assert order == [*FILES, "manifest.json"]
    said = json.loads((folder(tmp_path, 5) / "manifest.json").read_text())
    assert set(said) == {"step", "meta", "sha256"}
    assert set(said["sha256"]) == set(FILES)
