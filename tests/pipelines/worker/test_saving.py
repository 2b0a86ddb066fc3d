"""A snapshot equals the weights at its step, whatever training does while it is written."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch

from mae_core.state import unpack
from pipelines.runs.checkpoints import CheckpointStore, Retention
from pipelines.storage import Storage, open_storage
from pipelines.worker.saving import CheckpointWriter, Tensors
from tests.digest import tensors_digest
from tests.waiting import EVENT_DEADLINE_S

KEEP = Retention(newest=3)


class Weights:
    """Something that training changes in place."""

    def __init__(self) -> None:
        self.tensors = {"model": {"w": torch.arange(1000.0)}, "optimizer": {"step": torch.tensor(0.0)}}

    def learn(self) -> None:
        for tensors in self.tensors.values():
            for tensor in tensors.values():
                tensor.add_(1)

    def snapshot(self) -> Tensors:
        return {file: {name: t.clone() for name, t in tensors.items()} for file, tensors in self.tensors.items()}

    def digests(self) -> dict[str, str]:
        return {f"{file}.safetensors": tensors_digest(tensors) for file, tensors in self.tensors.items()}


class Gated(Storage):
    """Writes wait until the gate opens."""

    gate = threading.Event()

    @contextmanager
    def create(self, path: str) -> Iterator[IO[bytes]]:
        assert self.gate.wait(EVENT_DEADLINE_S)
        with super().create(path) as file:
            yield file


def writer_of(storage: Storage, patience_s: float = 0.0) -> CheckpointWriter:
    return CheckpointWriter(CheckpointStore(storage), KEEP, patience_s=patience_s, before=lambda: None)


def test_training_goes_on_while_a_snapshot_is_written_which_equals_the_weights_at_its_step(tmp_path: Path) -> None:
    Gated.gate.clear()
    weights, writer = Weights(), writer_of(Gated(str(tmp_path)))
    weights.learn()
    wanted = weights.digests()
    writer.save(1, weights.snapshot, {})
    for _ in range(5):
        weights.learn()
    assert CheckpointStore(open_storage(tmp_path)).steps() == []
    Gated.gate.set()
    writer.wait()
    checkpoint = CheckpointStore(open_storage(tmp_path)).load(1)
    assert {name: tensors_digest(unpack(content)) for name, content in checkpoint.files.items()} == wanted
    assert weights.digests() != wanted


def test_the_next_save_waits_for_the_one_before_and_only_then_takes_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gated.gate.clear()
    store = CheckpointStore(open_storage(tmp_path))
    weights, writer = Weights(), writer_of(Gated(str(tmp_path)))
    writer.save(1, weights.snapshot, {})
    wait = writer.wait

    def open_and_wait() -> None:
        assert store.steps() == []
        Gated.gate.set()
        wait()

    def take() -> Tensors:
        assert store.steps() == [1]
        return weights.snapshot()

    monkeypatch.setattr(writer, "wait", open_and_wait)
    writer.save(2, take, {})
    wait()
    assert store.steps() == [1, 2]


class Refusing(Storage):
    """Refuses so many writes."""

    left = 0

    @contextmanager
    def create(self, path: str) -> Iterator[IO[bytes]]:
        if Refusing.left:
            Refusing.left -= 1
            raise OSError(28, "No space left on device")
        with super().create(path) as file:
            yield file


def test_a_storage_that_refuses_for_a_while_costs_warnings_and_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Refusing.left = 1
    weights, writer = Weights(), writer_of(Refusing(str(tmp_path)), patience_s=30)
    with caplog.at_level(logging.WARNING):
        writer.save(1, weights.snapshot, {})
        writer.wait()
    assert "checkpoint of step 1, retrying in 0.5 s" in caplog.text
    assert CheckpointStore(open_storage(tmp_path)).latest_step() == 1


@pytest.mark.parametrize("by", ["wait", "save"])
def test_a_storage_that_refuses_for_good_surfaces_and_leaves_the_checkpoint_before(tmp_path: Path, by: str) -> None:
    Refusing.left = 0
    weights, writer = Weights(), writer_of(Refusing(str(tmp_path)))
    writer.save(1, weights.snapshot, {})
    writer.wait()
    Refusing.left = 1000
    writer.save(2, weights.snapshot, {})
    with pytest.raises(OSError, match=r"checkpoint of step 2 could not be written within 0 s .* make room"):
        writer.wait() if by == "wait" else writer.save(3, weights.snapshot, {})
    assert CheckpointStore(open_storage(tmp_path)).latest_step() == 1
