"""Linear probing on one rank: a linear layer behind a BatchNorm, on frozen features (Table 9)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.attentive import AttentiveHead
from mae_core.augment import pixels_to_input, soft_targets
from mae_core.classifier import ProbeHead, features, load_encoder_weights
from mae_core.config import parse_arch
from mae_core.encoder import build_encoder, encode
from mae_core.randomness import Purpose, seed_of
from mae_core.state import unpack
from mae_core.step import classify_loss
from pipelines.feed.micro_batch import MicroBatch
from pipelines.feed.plan import EpochPlan
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob
from pipelines.runs.plans import IndexedDataset, Phase, phases, read_plan, train_plan
from pipelines.storage import open_storage
from pipelines.worker.finetuning import result_of
from pipelines.worker.loop import TrainState
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.recorder import Recorder
from pipelines.worker.tally import Tally


@dataclass(frozen=True)
class Examples:
    """Frozen features [n d], or patch tokens [n p d], with their labels [n] and weights [n]."""

    features: Tensor
    labels: Tensor
    weights: Tensor


# step -> this rank's examples of that step
ExamplesOf = Callable[[int], Examples]


def run(
    job: ClassifyJob,
    dataset: IndexedDataset,
    rank: Rank,
    feed: Feed,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Train and evaluate the head; return the run's result."""
    config = job.config
    plan = train_plan(job, dataset)
    encode = frozen_encoder(job, rank)
    torch.manual_seed(seed_of(config.seed, Purpose.INIT, 1))
    head = _head(job).to(rank.device)
    # No DDP: BatchNorm's statistics and the gradients are summed over ranks in _fit.
    state = TrainState.of(config, head, head, plan.steps_per_epoch)
    recorder = Recorder.of(config, state, rank, plan, folder, feed.clock)
    if checkpoint and not job.caches_features:
        recorder.resume(checkpoint)
    total = config.epochs * plan.steps_per_epoch
    accuracy: dict[str, float] = {}
    tally = None
    with recorder.saving_if_stopped():
        for phase in phases(job, plan.steps_per_epoch, state.step, frozenset(dataset.manifest.splits)):
            if phase.split == "train" and phase.kind == "read":
                table = read_table(job, dataset, rank, feed, encode)
                with feed.clock.spent("steps"):
                    _fit(job, rank, plan, state, recorder, total, _examples_of_table(table, rank, plan, feed))
            elif phase.kind == "train":
                with feed.clock.spent("steps"):
                    _fit(job, rank, plan, state, recorder, phase.last_step, _live_examples(rank, plan, feed, encode))
            else:
                tally = _evaluate(job, dataset, rank, feed, phase, encode, head)
                accuracy = tally.accuracy(phase.split)
                recorder.record_accuracy(phase.first_step, phase.split, accuracy)
    recorder.finish()
    if tally is not None:
        tally.write(folder, config.eval_split)
    return result_of(job, accuracy, state.step, plan.num_samples)


def _head(job: ClassifyJob) -> ProbeHead | AttentiveHead:
    arch, config = parse_arch(job.arch), job.config.classifier
    if config.method == "attentive":
        return AttentiveHead(arch.width, len(job.classes), arch.heads, head_std=config.head_std)
    return ProbeHead(arch.width, len(job.classes), head_std=config.head_std)


def frozen_encoder(job: ClassifyJob, rank: Rank) -> Callable[[MicroBatch], Tensor]:
    """Build the encoder; return a function from a micro-batch to features, or to patch tokens for an attentive head."""
    torch.manual_seed(seed_of(job.config.seed, Purpose.INIT, 0))
    vit = build_encoder(parse_arch(job.arch), job.image_px, job.channels, norm_eps=job.norm_eps)
    if job.backbone:
        load_encoder_weights(vit, unpack(open_storage(job.backbone).read("encoder.safetensors")), job.backbone_px)
    vit.requires_grad_(False).eval().to(rank.device)

    config = job.config.classifier

    @torch.no_grad()
    def encoded(batch: MicroBatch) -> Tensor:
        images = pixels_to_input(batch.images, job.pixels)
        with rank.autocast():
            if config.method == "attentive":
                return encode(vit, images, None)[:, vit.num_prefix_tokens :].float()
            return features(vit, images, config.pool).float()

    return encoded


def _fit(
    job: ClassifyJob,
    rank: Rank,
    plan: EpochPlan,
    state: TrainState,
    recorder: Recorder,
    last_step: int,
    examples_of: ExamplesOf,
) -> None:
    """Train up to `last_step`. BatchNorm's statistics are those of the global batch, for any number of ranks."""
    smoothing, num_classes = job.config.augment.label_smoothing, len(job.classes)
    while state.step < last_step:
        examples = examples_of(state.step)
        if state.step in state.skipped_steps:
            state.step += 1
            recorder.after_step(state.step, None, None)
            continue
        planned = plan.planned(state.step)
        logits = state.model(examples.features, examples.weights, rank.sum)
        targets = soft_targets(examples.labels, num_classes, smoothing)
        loss = classify_loss(logits, targets, examples.weights) / planned
        loss.backward()
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                rank.sum(parameter.grad)
        bad = state.update()
        recorder.after_step(state.step, loss.detach(), bad)


def _live_examples(rank: Rank, plan: EpochPlan, feed: Feed, encode: Callable[[MicroBatch], Tensor]) -> ExamplesOf:
    def examples_of(step: int) -> Examples:
        batches = [b.to(rank.device) for b in feed.take(step, plan.micro_batches_per_step // rank.world)]
        return Examples(
            torch.cat([encode(batch) for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat([batch.weights for batch in batches]),
        )

    return examples_of


@dataclass(frozen=True)
class FeatureTable:
    """Features of a complete split, by ascending sample id, from which each rank draws its batches."""

    ids: Tensor
    features: Tensor
    labels: Tensor

    def take(self, plan: EpochPlan, rank: Rank, step: int) -> Examples:
        """Return this rank's examples of a step, the same that the feed would have sent."""
        ids = torch.from_numpy(plan.step_ids(step, rank.index)).to(self.ids.device)
        rows = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        # Placeholders (id -1) and samples that could not be decoded have no row and get weight 0.
        real = self.ids[rows] == ids
        return Examples(self.features[rows], self.labels[rows], real.float())


def read_table(
    job: ClassifyJob, dataset: IndexedDataset, rank: Rank, feed: Feed, encode: Callable[[MicroBatch], Tensor]
) -> FeatureTable:
    """Compute the features of the training split and gather them on every rank."""
    plan = read_plan(job, dataset, "train")
    ids, found, labels = [], [], []
    for batch in read_split(rank, plan, feed):
        ids.append(torch.where(batch.weights > 0, batch.ids, -1))
        found.append(encode(batch))
        labels.append(batch.labels)
    all_ids = torch.cat(rank.gather(torch.cat(ids)))
    all_features = torch.cat(rank.gather(torch.cat(found)))
    all_labels = torch.cat(rank.gather(torch.cat(labels)))
    order = torch.argsort(all_ids, stable=True)
    order = order[all_ids[order] >= 0]
    return FeatureTable(all_ids[order], all_features[order], all_labels[order])


def read_split(rank: Rank, plan: EpochPlan, feed: Feed) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of one pass over a split, on its device."""
    for step in range(plan.steps_per_epoch):
        for batch in feed.take(step, plan.micro_batches_per_step // rank.world):
            yield batch.to(rank.device)


def _examples_of_table(table: FeatureTable, rank: Rank, plan: EpochPlan, feed: Feed) -> ExamplesOf:
    def examples_of(step: int) -> Examples:
        feed.enter_step()
        return table.take(plan, rank, step)

    return examples_of


@torch.inference_mode()
def _evaluate(
    job: ClassifyJob,
    dataset: IndexedDataset,
    rank: Rank,
    feed: Feed,
    phase: Phase,
    encode: Callable[[MicroBatch], Tensor],
    head: nn.Module,
) -> Tally:
    tally = Tally(rank)
    head.eval()
    for batch in read_split(rank, read_plan(job, dataset, phase.split), feed):
        tally.add(head(encode(batch), batch.weights, None), batch)
    head.train()
    return tally
