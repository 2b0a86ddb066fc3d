"""A run's folder belongs to one run, and says no more than is true of it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Any) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def test_a_folder_is_claimed_once_and_by_one_run(folder: RunFolder) -> None:
    mine = {"kind": "pretrain", "config": {"epochs": 3, "model": {"arch": "a"}}}
    assert folder.read_identity() is None
    key = folder.claim(mine)
    assert folder.claim(mine) == key
    assert folder.read_identity() == {"id": key} | mine
    with pytest.raises(ValueError, match=r"with another config\.model\.arch \(a there, b here\); only .* may change"):
        folder.claim({"kind": "pretrain", "config": {"epochs": 3, "model": {"arch": "b"}}})
    assert folder.read_identity() == {"id": key} | mine


def test_drivers_that_claim_at_once_get_one_id(folder: RunFolder) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: RunFolder(folder.storage.uri).claim({"kind": "finetune"}), range(32)))
    assert ids == {folder.claim({"kind": "finetune"})}


def test_a_writer_that_was_killed_leaves_a_folder_that_can_be_claimed(folder: RunFolder) -> None:
    folder.storage.write(".run.json.123-0123abcd.tmp", b"half of")
    assert folder.claim({"kind": "finetune"})


def test_a_run_is_finished_then_published(folder: RunFolder) -> None:
    assert folder.read_result() is folder.read_outcome() is None
    folder.mark_trained({"loss": 0.5})
    assert folder.read_result() == {"loss": 0.5}
    assert folder.read_outcome() is None
    folder.mark_published({"model": "models:/x/1"})
    assert folder.read_outcome() == {"model": "models:/x/1"}


def test_a_cleared_folder_is_nobodys_and_a_half_cleared_one_is_unfinished(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = folder.claim({"kind": "pretrain"})
    folder.storage.write("checkpoints/step-0000000001/model.safetensors", b"x")
    folder.mark_trained({})
    folder.mark_published({})
    deleted: list[str] = []
    storage = folder.storage

    def delete(path: str) -> None:
        deleted.append(path)
        storage.delete(path)

    watched = SimpleNamespace(list=storage.list, delete=delete, delete_empty=storage.delete_empty)
    monkeypatch.setattr(folder, "storage", watched)
    monkeypatch.setattr(folder, "read_identity", lambda: {"id": key})
    folder.clear()
    monkeypatch.undo()
    assert set(deleted[:2]) == {"outcome.json", "result.json"}
    assert deleted[-1] == "run.json"
    assert storage.list() == []
    assert folder.claim({"kind": "finetune"}) != key
