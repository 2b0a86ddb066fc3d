"""What a worker group is started with, and what is said when it gives up."""

from pathlib import Path
from typing import Any

import pytest

from mae_core.config import ModelConfig, Normalization
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig
from pipelines.drivers.launch import RunFailed, launch
from pipelines.runs.jobs import PretrainJob


class Trainer:
    """Stands for Ray Train's: keeps what it was made with, and fails as it is told."""

    made: dict[str, Any]
    error: Exception | None = None

    def __init__(self, work: Any, **made: Any) -> None:
        Trainer.made = made

    def fit(self) -> None:
        if Trainer.error is not None:
            raise Trainer.error


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(Trainer, "error", None)
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "")
    return Trainer


def job_in(folder: Path) -> PretrainJob:
    model = ModelConfig(
        arch="vit_pico_patch7", image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=32, decoder_heads=2
    )
    config = PretrainConfig(
        data=DataConfig(uri=str(folder), batch=8, micro_batch=8),
        model=model,
        compute=ComputeConfig(stall_s=30, max_failures=2),
        checkpoint=CheckpointConfig(patience_s=100),
    )
    return PretrainJob(folder=str(folder), config=config, pixels=Normalization(mean=(0.5,), std=(0.5,)))


def test_ranks_wait_in_a_collective_for_one_that_waits_for_its_checkpoint(
    tmp_path: Path, trainer: type[Trainer]
) -> None:
    launch([job_in(tmp_path)], "waits")
    assert trainer.made["torch_config"].timeout_s >= 30 + 100


def test_a_group_that_gives_up_says_why_and_how_to_go_on(tmp_path: Path, trainer: type[Trainer]) -> None:
    from ray.train import WorkerGroupError

    failures: dict[int, Exception] = {0: RuntimeError("gloo: Connection closed by peer"), 1: MemoryError()}
    trainer.error = WorkerGroupError("long\nand\nwide", failures)
    said = r"^rank 1 ran out of memory \(MemoryError\); .*more than the 2 failures .*; the same command goes on from"
    with pytest.raises(RunFailed, match=said):
        launch([job_in(tmp_path)], "fails")
