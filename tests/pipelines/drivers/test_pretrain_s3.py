"""Where the shards and the checkpoints lie changes no bit of what is learned."""

import shutil
from pathlib import Path

import pytest

from mae_core.config import OptimConfig
from mae_core.state import unpack
from pipelines.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    PrepareConfig,
    PretrainConfig,
    TrackingConfig,
)
from pipelines.runs.folder import RunFolder
from pipelines.storage import open_storage
from tests.digest import tensors_digest
from tests.new_mlflow import new_mlflow
from tests.pipelines.drivers.small import MODEL

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]


def config(name: str, dataset: str, output: str) -> PretrainConfig:
    return PretrainConfig(
        name=name,
        output=output,
        epochs=2,
        data=DataConfig(uri=dataset, batch=32, micro_batch=8, window=64),
        model=MODEL,
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=1.0),
        compute=ComputeConfig(num_workers=1),
        checkpoint=CheckpointConfig(every_epochs=1.0, keep=1),
        tracking=TrackingConfig(log_every_steps=1, pictures_every_epochs=1000, register=False),
    )


def weights(output: str, name: str) -> dict[str, str]:
    """Digest of every file of the last checkpoint, optimizer and all."""
    checkpoint = RunFolder(open_storage(output).join(name)).checkpoints.latest()
    assert checkpoint is not None
    return {file: tensors_digest(unpack(content)) for file, content in checkpoint.files.items()}


def test_pretraining_from_a_bucket_equals_pretraining_from_a_folder(
    few: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cluster import ray_session
    from pipelines.drivers.pretrain import pretrain
    from pipelines.prepare import prepare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    bucket = f"{s3}/{tmp_path.name}"
    shutil.copytree(few / "train", tmp_path / "images")
    with ray_session(ComputeConfig()):
        options = PrepareConfig(rows_per_shard=48, rows_per_group=16)
        manifest = prepare("images", f"{bucket}/data", options)
        shards = open_storage(f"{bucket}/data")
        for path, _ in shards.list():
            open_storage("data").write(path, shards.read(path))
        pretrain(config("near", "data", "runs"), "s3")
        pretrain(config("far", f"{bucket}/data", f"{bucket}/runs"), "s3")
    assert manifest.num_ok == 240
    near = weights("runs", "near")
    assert len(near) >= 2
    assert weights(f"{bucket}/runs", "far") == near
