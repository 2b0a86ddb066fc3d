"""What a worker group is started with, and what is said when it gives up."""

import gc
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_core.normalization import Normalization
from pipelines.config import CheckpointConfig, ComputeConfig, DataConfig, PretrainConfig
from pipelines.dataset.manifest import Manifest, Split
from pipelines.drivers.drive import keep_compiled
from pipelines.drivers.launch import RunFailed, launch, light_imports
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import IndexedDataset, IndexedJob
from tests.pipelines.drivers.small import MODEL


class Trainer:
    """Stands for Ray Train's: keeps what it was made with, and fails as it is told."""

    made: dict[str, Any]
    error: Exception | None = None
    jobs: list[list[IndexedJob]]
    """Jobs that each was made with."""
    to_restart: RunFolder | None = None
    """The folder in which the next group requests a restart."""

    def __init__(self, work: Any, **made: Any) -> None:
        Trainer.made = made
        Trainer.jobs.append(made["train_loop_config"]["jobs"])

    def fit(self) -> None:
        if Trainer.to_restart is not None:
            Trainer.to_restart.request_restart("the checkpoint of step 7 is damaged")
            Trainer.to_restart = None
        if Trainer.error is not None:
            raise Trainer.error


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Trainer]:
    monkeypatch.setattr("pipelines.drivers.trainer.Trainer", Trainer)
    monkeypatch.setattr(Trainer, "error", None)
    monkeypatch.setattr(Trainer, "jobs", [], raising=False)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "")
    return Trainer


def job_in(folder: Path) -> IndexedJob:
    config = PretrainConfig(
        data=DataConfig(uri=str(folder), batch=8, micro_batch=8),
        model=MODEL,
        compute=ComputeConfig(stall_s=30, max_failures=2),
        checkpoint=CheckpointConfig(patience_s=100),
    )
    manifest = Manifest(
        channels=1, image_px=(28, 28), classes=[], splits={"train": Split(num_rows=0, num_bytes=0, shards=[])},
        num_found=0, num_ok=0, num_quarantined=0, num_duplicates=0, quarantine_reasons={}, mean=[0.5], std=[0.5],
        config={}, source_digest="",
    )  # fmt: skip
    job = PretrainJob(folder=str(folder), config=config, pixels=Normalization(mean=(0.5,), std=(0.5,)))
    return job, IndexedDataset(manifest=manifest, indexes={})


def test_ranks_wait_in_a_collective_for_one_that_waits_for_its_checkpoint(
    tmp_path: Path, trainer: type[Trainer]
) -> None:
    launch([job_in(tmp_path)], "waits")
    assert trainer.made["backend_config"].timeout_s >= 30 + 100


def test_a_group_that_gives_up_says_why_and_how_to_go_on(tmp_path: Path, trainer: type[Trainer]) -> None:
    from ray.train import WorkerGroupError

    failures: dict[int, Exception] = {0: RuntimeError("gloo: Connection closed by peer"), 1: MemoryError()}
    trainer.error = WorkerGroupError("long\nand\nwide", failures)
    said = r"^rank 1 ran out of memory \(MemoryError\); .*more than the 2 failures .*; rerun the same command to resume"
    with pytest.raises(RunFailed, match=said):
        launch([job_in(tmp_path)], "fails")


def test_a_group_that_requests_a_restart_is_launched_once_more(
    tmp_path: Path, trainer: type[Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    job, dataset = job_in(tmp_path)
    # Left by a driver that was killed: it must not cause another launch.
    RunFolder(job.folder).request_restart("of an earlier driver")
    launch([(job, dataset)], "undamaged")
    assert len(trainer.jobs) == 1
    trainer.to_restart = RunFolder(job.folder)
    with caplog.at_level(logging.WARNING):
        launch([(job, dataset)], "damaged")
    assert len(trainer.jobs) == 3
    assert all(given[0][1] is dataset for given in trainer.jobs), "a group that is launched again reads nothing again"
    assert "step 7 is damaged; restarting the workers from the newest intact checkpoint" in caplog.text
    assert not RunFolder(job.folder).restart_reason()


def test_compiled_kernels_are_kept_beside_local_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled("s3://bucket/runs")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    keep_compiled(str(tmp_path))
    keep_compiled(str(tmp_path / "others"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".compiled")


def test_a_rank_imports_without_garbage_collection_and_without_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    # Set before it is deleted, so that what the test imports does not stay.
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]
    with light_imports():
        assert not gc.isenabled()
        with pytest.raises(ImportError):
            importlib.import_module("wandb")
    assert gc.isenabled()
    assert importlib.import_module("wandb").__file__ == str(tmp_path / "wandb.py")
    with light_imports():
        assert importlib.import_module("wandb").__file__ == str(tmp_path / "wandb.py")
    gc.unfreeze()
