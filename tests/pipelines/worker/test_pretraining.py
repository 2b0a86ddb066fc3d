"""A whole pretraining run on one rank, without Ray: with the recipes that buy more, and extended after its end."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core import load_mae
from mae_core.config import ModelConfig, OptimConfig
from mae_core.state import model_tensors, pack, unpack
from pipelines.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    FixedCompute,
    PretrainConfig,
    ProgressiveConfig,
    TrackingConfig,
)
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.drive import claim
from pipelines.drivers.extend import extension_of, read_finished_run
from pipelines.drivers.pretrain import pixels_of, published_extension, published_pretrain_job
from pipelines.feed.micro_batch import window_micro_batches
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import IndexedDataset, index_dataset, segments
from pipelines.worker import pretraining
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.recorder import Stopped
from tests.digest import tensors_digest


def run_with(
    tiles: tuple[str, Manifest], folder: Path, micro_batch: int | None, **model_fields: Any
) -> dict[str, Tensor]:
    """Pretrain for a few steps with the micro-batch that auto chose; return the weights."""
    uri, manifest = tiles
    model = ModelConfig(
        arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2, **model_fields
    )  # fmt: skip
    config = PretrainConfig(
        epochs=2,
        data=DataConfig(uri=uri, batch=16, micro_batch=8, window=32),
        model=model,
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=1.0),
    )
    chosen = FixedCompute(micro_batch=micro_batch)
    job = PretrainJob(folder=str(folder), config=config, pixels=pixels_of(manifest, 3), chosen=chosen)
    dataset = index_dataset(job, manifest)
    (segment,) = segments(job, dataset, 0)
    batches = [batch for window in range(segment.num_windows) for batch in window_micro_batches(segment, window)]
    assert {len(batch.ids) for batch in batches} == {micro_batch or 8}
    rank = Rank(index=0, world=1, device=torch.device("cpu"), compute=job.compute)
    pretraining.run(job, dataset, rank, Feed(iter(batches)), RunFolder(job.folder), None)
    return model_tensors(load_mae(folder / "export")[0])


@pytest.mark.parametrize("micro_batch", [2, 16])
def test_the_micro_batch_changes_nothing_but_the_order_of_sums(
    tiles: tuple[str, Manifest], tmp_path: Path, micro_batch: int
) -> None:
    stated = run_with(tiles, tmp_path / "stated", None)
    other = run_with(tiles, tmp_path / "other", micro_batch)
    # A bias of keys has no effect, since softmax ignores it: its gradient is rounding, which AdamW scales up.
    for name, tensor in ((name, tensor) for name, tensor in stated.items() if not name.endswith("qkv.bias")):
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_principal_components_are_fitted_once_and_exported_with_the_model(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    first = run_with(tiles, tmp_path / "first", None, target="pca", pca_components=5)
    stored = unpack((tmp_path / "first" / "basis.safetensors").read_bytes())
    assert stored["components"].shape == (5, 48)
    assert torch.equal(first["basis.components"], stored["components"])
    assert torch.equal(first["basis.mean"], stored["mean"])
    again = run_with(tiles, tmp_path / "again", None, target="pca", pca_components=5)
    assert tensors_digest(again) == tensors_digest(first)
    # A restart reads what the run has, and fits nothing.
    other = pack({"mean": stored["mean"] + 1, "components": stored["components"]})
    (tmp_path / "restarted").mkdir()
    (tmp_path / "restarted" / "basis.safetensors").write_bytes(other)
    restarted = run_with(tiles, tmp_path / "restarted", None, target="pca", pca_components=5)
    assert torch.equal(restarted["basis.mean"], stored["mean"] + 1)


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


def run_on(job: PretrainJob, dataset: IndexedDataset) -> dict[str, str]:
    """Run the job from its newest checkpoint to its end; return the digest of every file of its last checkpoint."""
    folder = RunFolder(job.folder)
    checkpoint = folder.checkpoints.latest()
    remaining = segments(job, dataset, checkpoint.step if checkpoint else 0)
    windows = [(s, number + s.first_window) for s in remaining for number in range(s.num_windows)]
    batches = [batch for segment, window in windows for batch in window_micro_batches(segment, window)]
    rank = Rank(index=0, world=1, device=torch.device("cpu"), compute=ComputeConfig())
    folder.mark_trained(pretraining.run(job, dataset, rank, Feed(iter(batches)), folder, checkpoint))
    last = folder.checkpoints.latest()
    assert last is not None
    return {name: tensors_digest(unpack(content)) for name, content in last.files.items()}


@pytest.mark.slow
def test_an_extension_at_a_constant_rate_equals_one_longer_run(tiles: tuple[str, Manifest], tmp_path: Path) -> None:
    """Two epochs, and two more of which one decays, are four of which one decays: every weight and every moment."""
    uri, manifest = tiles
    optim = OptimConfig(base_lr=1e-2, warmup_epochs=0.0, schedule="constant", decay_share=0.0)
    config = PretrainConfig(
        output=str(tmp_path),
        epochs=2,
        data=DataConfig(uri=uri, batch=16, micro_batch=8, window=32),
        model=ModelConfig(arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2),
        optim=optim,
        checkpoint=CheckpointConfig(keep=9),
        tracking=TrackingConfig(pictures_every_epochs=1000),
    )

    def trained(config: PretrainConfig, name: str) -> dict[str, str]:
        published = published_pretrain_job(config, name, manifest)
        assert isinstance(published.job, PretrainJob)
        claim(published.job, "pretrain", manifest)
        return run_on(published.job, published.dataset)

    whole = trained(dataclasses.replace(config, epochs=4, optim=dataclasses.replace(optim, decay_share=0.25)), "whole")
    short, folder = trained(config, "short"), RunFolder(str(tmp_path / "short"))
    folder.mark_published({"run_id": "0" * 32, "steps": 6})

    run = read_finished_run(folder.storage.uri, "")
    extension = extension_of(folder.storage.uri, {"epochs": 2, "optim.decay_share": 0.5})
    published = published_extension(extension, run, manifest, None)
    assert isinstance(published.job, PretrainJob)
    assert published.first_checkpoint is not None
    key = claim(published.job, "pretrain", manifest)
    longer = RunFolder(published.job.folder)
    with pytest.raises(Stopped, match="rerun the same command to copy it again"):
        run_on(published.job, published.dataset)
    published.first_checkpoint.copy_to(longer, key)
    assert longer.checkpoints.load(6).files == folder.checkpoints.load(6).files
    assert run_on(published.job, published.dataset) == whole != short
    for kept in (6, 9):
        for step in longer.checkpoints.steps():
            if step > kept:
                longer.checkpoints.discard(step)
        assert run_on(published.job, published.dataset) == whole, f"resumed after step {kept}"


@pytest.mark.slow
def test_images_that_grow_resume_bit_for_bit_and_a_constant_size_is_no_schedule(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    uri, manifest = tiles
    plain = PretrainConfig(
        output=str(tmp_path),
        epochs=4,
        data=DataConfig(uri=uri, batch=16, micro_batch=8, window=32),
        model=ModelConfig(
            arch="vit_pico_patch2", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2,
            decoder_attention="cross", predicted_share=0.5,
        ),
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=1.0),
        checkpoint=CheckpointConfig(keep=99, every_epochs=1 / 3),
        tracking=TrackingConfig(pictures_every_epochs=4),
    )  # fmt: skip

    def trained(name: str, **fields: Any) -> tuple[PretrainJob, IndexedDataset, dict[str, str]]:
        published = published_pretrain_job(dataclasses.replace(plain, **fields), name, manifest)
        assert isinstance(published.job, PretrainJob)
        claim(published.job, "pretrain", manifest)
        return published.job, published.dataset, run_on(published.job, published.dataset)

    *_, alone = trained("alone")
    *_, constant = trained("constant", progressive=ProgressiveConfig(first_px=(8, 8)))
    job, dataset, whole = trained("growing", progressive=ProgressiveConfig(first_px=(4, 4), sizes=3, full_from=0.7))
    assert constant == alone
    assert [(s.first_step, s.transform.image_px) for s in segments(job, dataset, 0)] == [
        (0, (4, 4)),
        (6, (6, 6)),
        (9, (8, 8)),
    ]
    assert whole.keys() == alone.keys()
    assert whole["model.safetensors"] != alone["model.safetensors"]
    mae, _ = load_mae(tmp_path / "growing" / "export")
    assert mae.config == plain.model

    store = RunFolder(job.folder).checkpoints
    assert store.steps() == list(range(1, 13))
    for step in (9, 8, 6, 3, 2):  # where sizes change, at the end of an epoch, and in the middle of two
        for later in store.steps():
            if later > step:
                store.discard(later)
        assert run_on(job, dataset) == whole, f"resumed after step {step}"


@pytest.mark.slow
def test_muon_an_average_and_complementary_masks_resume_bit_for_bit_and_the_average_is_exported(
    tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    uri, manifest = tiles
    config = PretrainConfig(
        output=str(tmp_path),
        epochs=8,
        masks_per_image=4,
        complementary_masks=True,
        ema_decay=0.9,
        data=DataConfig(uri=uri, batch=16, micro_batch=16, window=32),
        model=ModelConfig(arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2),
        optim=OptimConfig(name="muon", base_lr=1e-2, warmup_epochs=0.0),
        checkpoint=CheckpointConfig(keep=9, every_epochs=4.0),
        tracking=TrackingConfig(pictures_every_epochs=1000),
    )
    published = published_pretrain_job(config, "averaged", manifest)
    assert isinstance(published.job, PretrainJob)
    claim(published.job, "pretrain", manifest)
    whole = run_on(published.job, published.dataset)
    mae, _ = load_mae(tmp_path / "averaged" / "export")
    assert tensors_digest(mae.state_dict()) == whole["ema.safetensors"] != whole["model.safetensors"]

    store = RunFolder(published.job.folder).checkpoints
    first, *later = store.steps()
    assert later
    for step in later:
        store.discard(step)
    assert run_on(published.job, published.dataset) == whole, f"resumed after step {first}"
