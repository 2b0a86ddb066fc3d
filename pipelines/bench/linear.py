"""Linear probe of an encoder in this process, without Ray, by a preset without random augmentation."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mae_core.augment import pixels_to_input, soft_targets
from mae_core.classifier import ProbeHead, features
from mae_core.errors import UserError
from mae_core.model import MaskedAutoencoder
from mae_core.normalization import Normalization
from mae_core.optim import build_optimizer
from mae_core.randomness import Purpose, seed_of
from mae_core.schedule import Schedule, apply_lr, peak_lr
from mae_core.step import classify_loss
from pipelines.bench.config import RecipesConfig
from pipelines.config import ClassifyConfig, load_preset
from pipelines.dataset.manifest import read_manifest
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.storage import open_storage


@dataclass(frozen=True)
class Table:
    """Features [n d] of a split with their labels [n]."""

    features: Tensor
    labels: Tensor


def probe_accuracy(mae: MaskedAutoencoder, pixels: Normalization, config: RecipesConfig, uri: str, seed: int) -> float:
    """Return the top-1 accuracy in percent of a linear layer on the frozen encoder.

    Raises UserError if the preset is not a linear probe without random augmentation.
    """
    recipe = load_preset(ClassifyConfig, config.probe)
    if recipe.augment.is_random or recipe.classifier.method != "probe":
        raise UserError(f"probe {config.probe!r} is not a linear probe without random augmentation; try nano_probe")
    storage = open_storage(uri)
    manifest = read_manifest(storage)
    # The same labelled images for every seed, so that runs differ in pretraining alone.
    train = Index.from_manifest(manifest, "train").take_per_class(storage, config.labels_per_class, seed=0)
    train_table = _encode(mae, pixels, recipe, uri, train)
    eval_table = _encode(mae, pixels, recipe, uri, Index.from_manifest(manifest, config.eval_split))
    head = _fit(train_table, recipe, len(manifest.classes), seed).eval()
    with torch.no_grad():
        predicted = head(eval_table.features, torch.ones(len(eval_table.labels))).argmax(dim=1)
    return 100 * float((predicted == eval_table.labels).double().mean())


@torch.no_grad()
def _encode(mae: MaskedAutoencoder, pixels: Normalization, recipe: ClassifyConfig, uri: str, index: Index) -> Table:
    micro_batch = recipe.data.micro_batch
    plan = EpochPlan(
        index=index,
        seed=0,
        batch=micro_batch,
        micro_batch=micro_batch,
        num_workers=1,
        window=recipe.data.window,
        shuffle=False,
    )
    model = mae.config
    transform = Transform(train=False, image_px=model.image_px, channels=model.channels, augment=recipe.augment, seed=0)
    segment = FeedSegment(dataset_uri=uri, plan=plan, transform=transform, first_step=0, last_step=plan.steps_per_epoch)
    found, labels = [], []
    for batch in _batches(segment):
        real = batch.weights > 0
        found.append(features(mae.encoder, pixels_to_input(batch.images, pixels), recipe.classifier.pool)[real])
        labels.append(batch.labels[real])
    return Table(torch.cat(found), torch.cat(labels))


def _batches(segment: FeedSegment) -> Iterator[MicroBatch]:
    for window in range(segment.num_windows):
        yield from window_micro_batches(segment, window)


def _fit(table: Table, recipe: ClassifyConfig, num_classes: int, seed: int) -> ProbeHead:
    """Train a head for the preset's epochs over the table, in batches drawn from the seed."""
    batch = min(recipe.data.batch, len(table.labels))
    steps_per_epoch = len(table.labels) // batch
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, Purpose.INIT, 1))
        head = ProbeHead(table.features.shape[1], num_classes, head_std=recipe.classifier.head_std)
    peak = peak_lr(recipe.optim.base_lr, batch)
    optimizer = build_optimizer(head, recipe.optim, peak)
    schedule = Schedule(
        peak_lr=peak,
        min_lr=recipe.optim.min_lr,
        warmup_steps=round(recipe.optim.warmup_epochs * steps_per_epoch),
        total_steps=recipe.epochs * steps_per_epoch,
    )
    generator = torch.Generator().manual_seed(seed_of(seed, Purpose.ROWS))
    weights = torch.ones(batch)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(table.labels), generator=generator)
        for i in range(steps_per_epoch):
            rows = order[i * batch : (i + 1) * batch]
            targets = soft_targets(table.labels[rows], num_classes, recipe.augment.label_smoothing)
            loss = classify_loss(head(table.features[rows], weights), targets, weights) / batch
            loss.backward()
            apply_lr(optimizer, schedule.lr(epoch * steps_per_epoch + i))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return head
