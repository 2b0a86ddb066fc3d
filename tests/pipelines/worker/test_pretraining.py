"""A whole pretraining run on one rank, without Ray, with the recipes that buy more."""

from pathlib import Path

import torch

from mae_core import load_mae
from mae_core.config import ModelConfig, OptimConfig
from pipelines.config import ComputeConfig, DataConfig, PretrainConfig
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.feed.windows import window_micro_batches
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob, index_dataset, segments
from pipelines.worker import pretraining
from pipelines.worker.rank import Feed, Rank


def test_a_run_with_all_recipes_trains_is_pictured_and_exported(tiles: tuple[str, Manifest], tmp_path: Path) -> None:
    uri, manifest = tiles
    config = PretrainConfig(
        epochs=8,
        masks_per_image=2,
        crops_per_image=2,
        data=DataConfig(uri=uri, batch=16, micro_batch=8, window=32),
        model=ModelConfig(
            arch="vit_pico_patch4",
            image_px=(8, 8),
            decoder_depth=1,
            decoder_width=16,
            decoder_heads=2,
            decoder_attention="cross",
            predicted_share=0.5,
        ),
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=1.0),
    )
    job = PretrainJob(folder=str(tmp_path / "run"), config=config, pixels=pixels_of(manifest, 3))
    dataset = index_dataset(job, manifest)
    (segment,) = segments(job, dataset, 0)
    batches = [batch for window in range(segment.num_windows) for batch in window_micro_batches(segment, window)]
    # Eight epochs are two passes over 40 images, in steps of 4 images, two crops and two masks: 16 masked images.
    assert sum(int(batch.weights.sum()) for batch in batches) == 2 * 40
    folder = RunFolder(job.folder)
    rank = Rank(index=0, world=1, device=torch.device("cpu"), compute=ComputeConfig())
    found = pretraining.run(job, dataset, rank, Feed(iter(batches)), folder, None)
    assert found["steps"] == 2 * 10
    assert 0 < found["loss"] < 2
    mae, normalization = load_mae(tmp_path / "run" / "export")
    assert (mae.config, normalization) == (config.model, job.pixels)
    assert any(path.startswith("pictures/") for path, _ in folder.storage.list())
