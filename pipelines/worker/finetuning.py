"""Fine-tuning, partial fine-tuning and training from scratch on one rank."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_core.augment import drop_bands, erase, mixup, pixels_to_input
from mae_core.classifier import build_classifier, load_encoder_weights
from mae_core.config import parse_arch
from mae_core.multi_label import mean_average_precision, multi_hot, multi_label_loss, targets_of
from mae_core.randomness import Purpose, seed_of
from mae_core.state import model_tensors, unpack
from mae_core.step import classify_loss
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob
from pipelines.runs.plans import IndexedDataset, Phase, phases, read_plan, train_plan
from pipelines.storage import open_storage
from pipelines.worker.export import classifier_files
from pipelines.worker.loop import LossOf, TrainState, train, warm_up
from pipelines.worker.rank import Feed, Rank, unwrapped
from pipelines.worker.recorder import Recorder
from pipelines.worker.tally import Tally


def run(
    job: ClassifyJob,
    dataset: IndexedDataset,
    rank: Rank,
    feed: Feed,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Train, evaluate and export the classifier; return the run's result."""
    config = job.config
    plan = train_plan(job, dataset)
    state = _start(job, rank, plan.steps_per_epoch)
    loss_of = _loss_of(job, plan.steps_per_epoch, rank)
    blank = MicroBatch.blank(config.data.micro_batch, *job.input, in_float=job.pixels.values is not None)
    warm_up(state, blank.to(rank.device), loss_of)
    recorder = Recorder.of(config, state, rank, plan, folder, feed.clock)
    if checkpoint:
        recorder.resume(checkpoint)
    accuracy, tally = {}, None
    with recorder.saving_if_stopped():
        for phase in phases(job, plan.steps_per_epoch, state.step, frozenset(dataset.manifest.splits)):
            if phase.kind == "train":
                train(state, rank, plan, feed, phase.last_step, loss_of, recorder.after_step)
            else:
                accuracy, tally = evaluate(job, dataset, rank, feed, phase, state.ema or unwrapped(state.model))
                recorder.record_accuracy(phase.first_step, phase.split, accuracy)
    recorder.finish()
    if tally is not None:
        tally.write(folder, config.eval_split)
    if rank.is_main:
        export(job, state.ema or unwrapped(state.model), folder)
    return result_of(job, accuracy, state.step, plan.num_samples)


def _start(job: ClassifyJob, rank: Rank, steps_per_epoch: int) -> TrainState:
    config = job.config
    torch.manual_seed(seed_of(config.seed, Purpose.INIT, 1))
    model = build_classifier(
        parse_arch(job.arch), job.image_px, job.channels, len(job.classes), config.classifier, job.norm_eps
    )
    if job.backbone:
        load_encoder_weights(model, unpack(open_storage(job.backbone).read("encoder.safetensors")), job.backbone_px)
    return TrainState.of(config, model, rank.parallel(model), steps_per_epoch, config.classifier.ema_decay)


def _loss_of(job: ClassifyJob, steps_per_epoch: int, rank: Rank) -> LossOf:
    config, num_classes = job.config, len(job.classes)
    hot = multi_hot(job.label_sets, num_classes).to(rank.device) if job.label_sets else None

    def loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
        epoch = step // steps_per_epoch
        images = pixels_to_input(batch.images, job.pixels)
        prob = config.augment.drop_bands
        images = drop_bands(images, prob, seed=config.seed, epoch=epoch, sample_ids=batch.ids)
        images = erase(images, config.augment.erase, seed=config.seed, epoch=epoch, sample_ids=batch.ids)
        targets = None if hot is None else targets_of(batch.labels, hot)
        images, targets = mixup(
            images, batch.labels, num_classes, config.augment, seed=config.seed, step=step, micro=index, targets=targets
        )
        torch.manual_seed(seed_of(config.seed, Purpose.DROP_PATH, step, index))
        with rank.autocast():
            logits = model(images)
        return (classify_loss if hot is None else multi_label_loss)(logits.float(), targets, batch.weights)

    return loss_of


@torch.inference_mode()
def evaluate(
    job: ClassifyJob, dataset: IndexedDataset, rank: Rank, feed: Feed, phase: Phase, model: nn.Module
) -> tuple[dict[str, float], Tally | None]:
    """Return top-1 and top-5 in percent over the phase's split, independent of the number of ranks; and predictions.

    The keys are SPLIT/top1 and SPLIT/top5; with several classes an image, SPLIT/map alone. Every rank must call it.
    """
    if job.label_sets:
        return {f"{phase.split}/map": 100 * _mean_average_precision(job, dataset, rank, feed, phase, model)}, None
    plan, tally = read_plan(job, dataset, phase.split), Tally(rank)
    training = model.training
    model.eval()
    for step in range(plan.steps_per_epoch):
        for batch in feed.take(step, plan.micro_batches_per_step // rank.world):
            found = batch.to(rank.device)
            with rank.autocast():
                logits = model(pixels_to_input(found.images, job.pixels))
            tally.add(logits, found)
    model.train(training)
    return tally.accuracy(phase.split), tally


def _mean_average_precision(
    job: ClassifyJob, dataset: IndexedDataset, rank: Rank, feed: Feed, phase: Phase, model: nn.Module
) -> float:
    """Return the mean average precision over the phase's split, from the logits of all ranks."""
    plan = read_plan(job, dataset, phase.split)
    ids, logits, labels = [], [], []
    training = model.training
    model.eval()
    for step in range(plan.steps_per_epoch):
        for batch in feed.take(step, plan.micro_batches_per_step // rank.world):
            found = batch.to(rank.device)
            with rank.autocast():
                logits.append(model(pixels_to_input(found.images, job.pixels)).float())
            ids.append(torch.where(found.weights > 0, found.ids, -1))
            labels.append(found.labels)
    model.train(training)
    all_ids, all_logits, all_labels = (torch.cat(rank.gather(torch.cat(found))) for found in (ids, logits, labels))
    order = torch.argsort(all_ids, stable=True)
    order = order[all_ids[order] >= 0]
    hot = multi_hot(job.label_sets, len(job.classes)).to(rank.device)
    return mean_average_precision(all_logits[order], targets_of(all_labels[order], hot))


def export(job: ClassifyJob, model: nn.Module, folder: RunFolder) -> None:
    """Write to export/ what the registry takes: weights, classes and preprocessing."""
    files = classifier_files(
        model_tensors(model),
        job.config.classifier,
        arch=job.arch,
        image_px=job.image_px,
        channels=job.channels,
        classes=job.classes,
        norm_eps=job.norm_eps,
        pixels=job.pixels,
        multi_label=bool(job.label_sets),
    )
    for name, content in files.items():
        folder.storage.write(f"export/{name}", content)


def result_of(job: ClassifyJob, accuracy: dict[str, float], steps: int, num_train: int) -> dict[str, Any]:
    """Return the result of the run, with accuracies in percent."""
    split = job.config.eval_split
    names = ("map",) if job.label_sets else ("top1", "top5")
    return {
        "kind": job.config.classifier.method,
        "split": split,
        **{name: round(accuracy[f"{split}/{name}"], 3) for name in names},
        "steps": steps,
        "num_train": num_train,
    }
