"""All ranks resume from one checkpoint, which each of them reads once, or leave for another start together."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.folder import RunFolder
from pipelines.worker.rank import Rank
from pipelines.worker.resuming import RestartRequested, load_newest
from tests.pipelines.worker.test_loop import rank_of

ALONE = rank_of(0, 1)


class BesideDamage(Rank):
    """Rank 0 of two, of which the other has read a damaged file."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + 1


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, files={"model.safetensors": f"after {step}".encode()}, meta={"last": {}})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Return a run with checkpoints of steps 5 and 6."""
    folder = RunFolder(str(tmp_path))
    for step in (5, 6):
        folder.checkpoints.save(checkpoint(step), Retention(newest=2))
    return folder


def test_a_run_without_a_checkpoint_starts_from_nothing(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert load_newest(folder, ALONE) is None
    assert not folder.restart_reason()


def test_an_intact_checkpoint_is_resumed_from(folder: RunFolder) -> None:
    assert load_newest(folder, ALONE) == checkpoint(6)
    assert not folder.restart_reason()


def test_a_damaged_checkpoint_is_discarded_and_a_restart_requested(folder: RunFolder, tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-0000000006"
    path = newest / json.loads((newest / "manifest.json").read_text())["files"]["model.safetensors"]["path"]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(RestartRequested, match=r"step 6 in .* is damaged"):
        load_newest(folder, ALONE)
    assert "step 6" in folder.restart_reason()
    assert folder.checkpoints.steps() == [5]
    assert load_newest(folder, ALONE) == checkpoint(5)


def test_damage_that_another_rank_finds_counts_for_all(folder: RunFolder) -> None:
    rank = BesideDamage(index=0, world=1, device=ALONE.device, compute=ALONE.compute)
    with pytest.raises(RestartRequested):
        load_newest(folder, rank)
    assert folder.checkpoints.steps() == [5]
