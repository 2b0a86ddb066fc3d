"""What the processes of a worker group read of their datasets besides row groups: nothing, since the driver has."""

import logging
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig
from pipelines.config import ClassifyConfig, ComputeConfig, DataConfig, PretrainConfig, TrackingConfig
from pipelines.dataset.manifest import Manifest
from pipelines.runs.folder import RunFolder
from tests.new_mlflow import new_mlflow

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ARCH = "vit_pico_patch4"
COMPUTE = ComputeConfig(num_workers=2, min_workers=1, max_failures=3)


def watching(folder: Path) -> Callable[[], None]:
    """Return a function that makes its process log what it reads, and die after the first checkpoint of all.

    The function is nested so that it is pickled by value, since Ray's workers need not be able to import tests.
    """
    log, killed = str(folder / "reads.log"), str(folder / "killed")

    def watch() -> None:
        import os
        import signal

        from pipelines.feed.plan import Index
        from pipelines.runs.checkpoints import CheckpointStore
        from pipelines.storage import Storage

        read, commit = Storage.read, CheckpointStore.commit
        labels, from_manifest = Index.labels, Index.__dict__["from_manifest"].__func__

        def note(what: str) -> None:
            # One write, so that lines of several processes do not mix.
            file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(file, f"{os.getpid()} {what}\n".encode())
            os.close(file)

        def noted_read(self: Any, path: str, *rest: Any) -> bytes:
            if path == "manifest.json":
                note(path)
            return read(self, path, *rest)

        def noted_labels(self: Any, *rest: Any) -> Any:
            note("labels")
            return labels(self, *rest)

        def noted_index(cls: Any, manifest: Any, split: str) -> Any:
            note(f"index of {split}")
            return from_manifest(cls, manifest, split)

        def fatal_commit(self: Any, *rest: Any) -> None:
            commit(self, *rest)
            try:
                os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        patches: dict[Any, dict[str, Any]] = {
            Storage: {"read": noted_read},
            CheckpointStore: {"commit": fatal_commit},
            Index: {"labels": noted_labels, "from_manifest": classmethod(noted_index)},
        }
        for owner, methods in patches.items():
            for name, method in methods.items():
                setattr(owner, name, method)

    return watch


def drive_watched(uri: str, manifest: Manifest, folder: Path) -> None:
    """Train three jobs in one worker group on a Ray of its own, whose processes all log what they read."""
    import ray

    watch = watching(folder)
    watch()
    os.environ["MLFLOW_TRACKING_URI"] = new_mlflow(folder)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    # The path of a socket may have 107 bytes, and pytest's folders would make it longer.
    with tempfile.TemporaryDirectory(prefix="mae-ray-", dir="/tmp") as scratch:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 2**20,
            _temp_dir=scratch,
            runtime_env={"worker_process_setup_hook": watch},
        )
        try:
            from pipelines.drivers.drive import drive
            from pipelines.registry import open_tracking

            drive(published_jobs(uri, manifest, folder), "watched", open_tracking("mae"), fresh=False)
        finally:
            ray.shutdown()


def published_jobs(uri: str, manifest: Manifest, folder: Path) -> list[Any]:
    """Return a pretraining, a fine-tuning and a probe, each on 16 labelled images of each class."""
    from pipelines.drivers.classify import published_classify_job, starting_encoder
    from pipelines.drivers.pretrain import published_pretrain_job
    from pipelines.registry import open_tracking

    shared: dict[str, Any] = {
        "data": DataConfig(uri=uri, batch=16, micro_batch=4, window=16, labels_per_class=16),
        "output": str(folder / "runs"),
        "epochs": 2,
        "optim": OptimConfig(warmup_epochs=0.0),
        "compute": COMPUTE,
        "tracking": TrackingConfig(pictures_every_epochs=1, register=False),
    }
    model = ModelConfig(arch=ARCH, image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2)
    jobs = [published_pretrain_job(PretrainConfig(model=model, **shared), "pretrain", manifest)]
    for method in ("finetune", "probe"):
        config = ClassifyConfig(
            backbone=f"random:{ARCH}",
            classifier=ClassifierConfig(method=method, pool="avg"),
            augment=AugmentConfig(crop="none", flip=False),
            **shared,
        )
        start = starting_encoder(config, None, open_tracking("mae"), manifest)
        jobs.append(published_classify_job(config, method, start, manifest))
    return jobs


def test_the_driver_indexes_and_reads_labels_once_a_job_and_its_workers_never(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    # Another process, since this one may hold the Ray that other tests share.
    driver = multiprocessing.get_context("spawn").Process(target=drive_watched, args=(*tiles, tmp_path))
    driver.start()
    try:
        driver.join(500)
        assert driver.exitcode == 0
    finally:
        driver.kill()
    # The group was killed and started again, which must not change what is read.
    assert sum(len(RunFolder(str(folder)).read_failures()) for folder in (tmp_path / "runs").iterdir()) >= 1
    found = Counter((tmp_path / "reads.log").read_text().splitlines())
    wanted = {"labels": 3, "index of train": 3, "index of val": 2}
    assert found == {f"{driver.pid} {what}": times for what, times in wanted.items()}
