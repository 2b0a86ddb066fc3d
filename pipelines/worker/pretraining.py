"""Pretraining on one rank."""

import dataclasses
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from mae_core.augment import drop_bands, pixels_to_input
from mae_core.basis import principal_components
from mae_core.config import ModelConfig
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.state import model_tensors, pack, unpack
from mae_core.step import pretrain_loss
from mae_core.transfer import start_from
from pipelines.config import from_dict
from pipelines.evaluation.periodic import SubsetImages
from pipelines.evaluation.subset import training_images
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan
from pipelines.pictures.figures import reconstruction_rows
from pipelines.pictures.reconstruct import picture_block, split_images
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import IndexedDataset, ListedDataset, last_step, listed_plan, train_plan
from pipelines.storage import open_storage
from pipelines.worker.evaluations import EvaluationActor, EvaluationQueue
from pipelines.worker.export import backbone_files
from pipelines.worker.fitting import check_fits
from pipelines.worker.gpu_meter import GpuMeter
from pipelines.worker.loop import LossOf, TrainState, train, train_while, warm_up
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.recorder import Recorder, Stopped, due_of

log = logging.getLogger(__name__)

_NUM_IMAGES_DRAWN = 8
_NUM_IMAGES_FITTED = 2048
_BASIS = "basis.safetensors"
"""File of the run folder with the principal components that are predicted."""


def run(
    job: PretrainJob,
    dataset: IndexedDataset,
    rank: Rank,
    feed: Feed,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Pretrain and export the model; return the run's result.

    Raises Stopped if the job extends a run whose checkpoint is not in the folder.
    """
    config, reading, first_epoch = job.config, job.reading, job.first_epoch
    if job.extended and checkpoint is None:
        _stop_without_start(rank, folder)
    plan = train_plan(job, dataset)
    mae = _built(job, rank)
    _set_basis(mae, job, dataset, rank, folder)
    total = last_step(job, plan.steps_per_epoch)
    state = _state(job, mae, rank, plan.steps_per_epoch)
    exported = mae if state.ema is None else state.ema
    assert isinstance(exported, MaskedAutoencoder)
    loss_of = loss_function(job, plan.steps_per_epoch, rank)
    gpu = GpuMeter.of(job, plan.steps_per_epoch, rank)
    _warm_up(job, state, loss_of, folder, rank)

    def save_picture(step: int) -> None:
        _save_picture(job, dataset, exported, folder, step)

    evaluations = _evaluations(job, dataset, plan, folder) if rank.is_main and reading.evaluate.every_epochs else None
    with evaluations or nullcontext():
        recorder = Recorder.of(
            reading,
            state,
            rank,
            plan,
            folder,
            feed.clock,
            picture=save_picture,
            evaluations=evaluations,
            first_epoch=first_epoch,
            gpu=gpu,
        )
        if checkpoint:
            recorder.resume(checkpoint)
        with recorder.saving_if_stopped():
            train(state, rank, plan, feed, total, loss_of, recorder.after_step)
        recorder.finish()
        if rank.is_main:
            for name, content in backbone_files(config.model, job.pixels, pack(model_tensors(exported))).items():
                folder.storage.write(f"export/{name}", content)
        found = {"evaluation": evaluations.finish()} if evaluations else {}
    return {"kind": "pretrain", "steps": total, "loss": recorder.last.get("train/loss"), **found}


def run_listed_epoch(
    job: PretrainJob,
    dataset: ListedDataset,
    rank: Rank,
    feed: Feed,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
) -> None:
    """Train the first epoch while its samples are being prepared, and save a checkpoint at its end.

    The learning rate is that of an epoch of as many samples as are expected. There are no pictures and evaluations.
    """
    plan = listed_plan(job, dataset, checkpoint.step if checkpoint else 0)
    mae = _built(job, rank)
    state = _state(job, mae, rank, plan.steps_per_epoch)
    # No step is of another epoch than the first, however many there are.
    loss_of = loss_function(job, dataset.most_samples + 1, rank)
    gpu = GpuMeter.of(job, plan.steps_per_epoch, rank)
    _warm_up(job, state, loss_of, folder, rank)
    recorder = Recorder.of(job.reading, state, rank, plan, folder, feed.clock, gpu=gpu)
    if checkpoint:
        recorder.resume(checkpoint)

    def has_step(step: int) -> bool:
        with feed.clock.spent("data"):
            return plan.await_step(step, feed.is_held)

    with recorder.saving_if_stopped():
        train_while(has_step, state, rank, plan, feed, loss_of, recorder.after_step)
    recorder.save_and_finish()


def _built(job: PretrainJob, rank: Rank) -> MaskedAutoencoder:
    """Build the model, with the weights of the job's backbone where they fit."""
    with rank.stage("building the model"):
        mae = build_mae(job.config.model, job.config.seed)
    if job.backbone:
        _start_from_backbone(mae, job.backbone)
    return mae


def _state(job: PretrainJob, mae: MaskedAutoencoder, rank: Rank, steps_per_epoch: int) -> TrainState:
    state = TrainState.of(
        job.reading,
        mae,
        rank.parallel(mae),
        steps_per_epoch,
        job.config.ema_decay,
        first_epoch=job.first_epoch,
        start_lr=job.extended.end_lr if job.extended else 0.0,
    )
    mae.add_sizes(size for _, size in job.stages[:-1])
    if len(job.stages) > 1:
        sizes = ", ".join(f"{size[0]} x {size[1]} px from epoch {epoch}" for epoch, size in job.stages)
        rank.log(log, "images grow: %s", sizes)
    return state


def _warm_up(job: PretrainJob, state: TrainState, loss_of: LossOf, folder: RunFolder, rank: Rank) -> None:
    config, in_float = job.config, job.pixels.values is not None
    blanks = [
        MicroBatch.blank(
            job.reading.data.micro_batch, size, config.model.channels, config.crops_per_image, in_float=in_float
        ).to(rank.device)
        for _, size in job.stages
    ]
    with rank.stage("compiling" if job.compute.compile else "warming up"):
        if rank.device.type == "cuda":
            check_fits(job, state, blanks[-1], loss_of, folder, rank)
        # Every size is compiled now, and none in the middle of the run.
        for blank in blanks:
            warm_up(state, blank, loss_of)


def _evaluations(job: PretrainJob, dataset: IndexedDataset, plan: EpochPlan, folder: RunFolder) -> EvaluationQueue:
    due, first_step = due_of(job.reading, plan, job.first_epoch), job.first_epoch * plan.steps_per_epoch
    return EvaluationQueue(
        EvaluationActor(job.config, job.pixels, dataset.manifest),
        folder.storage,
        num_due=due.num_evaluations(first_step),
        wait_s=job.config.evaluate.wait_s,
    )


def _stop_without_start(rank: Rank, folder: RunFolder) -> None:
    """Stop a run that extends another and has lost every checkpoint: it must not start from random weights."""
    cause = (
        f"no intact checkpoint in {folder.storage.uri}, not even the first one, which was copied from the extended "
        "run; rerun the same command to copy it again"
    )
    if rank.is_main:
        folder.mark_stopped(cause)
    rank.barrier()
    raise Stopped(cause)


def _start_from_backbone(mae: MaskedAutoencoder, uri: str) -> None:
    """Copy the weights of the folder into the model where they fit."""
    storage = open_storage(uri)
    values = json.loads(storage.read("config.json"))
    name = "mae.safetensors" if storage.exists("mae.safetensors") else "encoder.safetensors"
    start_from(mae, unpack(storage.read(name)), from_dict(ModelConfig, values["model"]))


def _set_basis(
    mae: MaskedAutoencoder, job: PretrainJob, dataset: IndexedDataset, rank: Rank, folder: RunFolder
) -> None:
    """Give the model the principal components that it predicts, unless it has none or those of its backbone.

    Rank 0 fits them once a run, and all ranks and restarts read them from the run folder.
    """
    if mae.basis is None or mae.basis.is_fitted:
        return
    if rank.is_main and not folder.storage.exists(_BASIS):
        model = job.config.model
        chosen = training_images(dataset.manifest, _NUM_IMAGES_FITTED, seed=job.config.seed)
        images = SubsetImages(job.config, job.pixels, dataset.manifest, "train", chosen)
        with rank.stage("fitting principal components"):
            inputs = (pixels_to_input(pixels, job.pixels) for pixels, _ in images.batches())
            mean, components = principal_components(inputs, model.patch_px, model.pca_components)
        folder.storage.write(_BASIS, pack({"mean": mean, "components": components}))
    rank.barrier()
    mae.basis.load_state_dict(unpack(folder.storage.read(_BASIS)))


def loss_function(job: PretrainJob, steps_per_epoch: int, rank: Rank) -> LossOf:
    """Return the function that computes the loss of a micro-batch, with masks keyed by seed, epoch and sample."""
    config = job.config
    models = {size: dataclasses.replace(config.model, image_px=size) for _, size in job.stages}

    def loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
        images, epoch = pixels_to_input(batch.images, job.pixels), step // steps_per_epoch
        prob = config.augment.drop_bands
        seen = drop_bands(images, prob, seed=config.seed, epoch=epoch, sample_ids=batch.ids) if prob else None
        height_px, width_px = batch.images.shape[1:3]
        mask = training_masks(
            models[height_px, width_px],
            seed=config.seed,
            epoch=epoch,
            sample_ids=batch.ids,
            masks_per_image=config.views_per_image,
            complementary=config.complementary_masks,
        )
        with rank.autocast():
            return pretrain_loss(model, images, mask, batch.weights, seen)

    return loss_of


def _save_picture(
    job: PretrainJob, dataset: IndexedDataset, mae: MaskedAutoencoder, folder: RunFolder, step: int
) -> None:
    """Draw reconstructions of a few held-out images, the same at every step, to pictures/ of the run folder."""
    splits = dataset.manifest.splits
    split, values = splits.get("val", splits["train"]), job.pixels.values
    images = split_images(job.config.data.uri, split, _NUM_IMAGES_DRAWN, *job.input, values)
    mae.eval()
    block = picture_block(mae, job.pixels, images, job.config.model.mask.ratio, job.config.seed)
    mae.train()
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "picture.png"
        reconstruction_rows([block], path)
        folder.storage.write(f"pictures/reconstructions-{step:010d}.png", path.read_bytes())
