"""`mae bench recipes`: compare pretraining recipes that get equal time, by linear probes.

It runs in one process with one rank and without Ray. Images are decoded between the steps. So the budget includes the
cost of decoding, as on a machine where data tasks and training share the cores.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_core.augment import pixels_to_input
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.optim import build_optimizer
from mae_core.schedule import Schedule, peak_lr
from mae_core.step import pretrain_loss
from pipelines.bench.config import RecipesConfig
from pipelines.bench.linear import probe_accuracy
from pipelines.config import ComputeConfig, PretrainConfig, load_preset
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.drivers.pretrain import open_dataset, pixels_of
from pipelines.feed.micro_batch import MicroBatch, window_micro_batches
from pipelines.feed.segments import FeedSegment
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import index_dataset, segments, train_plan
from pipelines.storage import open_storage
from pipelines.worker.loop import TrainState

log = logging.getLogger(__name__)

_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# Resolution of the learning-rate schedule, which advances with the spent share of the budget.
_SCHEDULE_STEPS = 10_000


def run(config: RecipesConfig) -> dict[str, Any]:
    """Do every run that the output file lacks and append it; return all runs, and a table of their accuracies."""
    uri, _ = open_dataset(config.uri)
    path = Path(config.out)
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(r["recipe"], r["share"], r["seed"]) for r in found if r["budget_s"] == config.budget_s}
    for seed in range(config.seeds):
        for share in config.shares:
            for recipe in config.recipes:
                if (recipe, share, seed) in done:
                    continue
                result = one_run(config, uri, recipe, share, seed)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                log.info("%s", result)
                found.append(result)
    shown = [r for r in found if r["budget_s"] == config.budget_s]
    return {"objects": shown, "text": table(shown)}


def one_run(config: RecipesConfig, uri: str, recipe: str, share: float, seed: int) -> dict[str, Any]:
    """Pretrain one recipe for a share of the budget and probe it; return the run's line of the output file."""
    pretrain = load_preset(PretrainConfig, recipe)
    pretrain = dataclasses.replace(
        pretrain,
        seed=seed,
        data=dataclasses.replace(pretrain.data, uri=uri),
        compute=ComputeConfig(threads=torch.get_num_threads()),
    )
    manifest = read_manifest(open_storage(uri))
    job = PretrainJob(folder="", config=pretrain, pixels=pixels_of(manifest, pretrain.model.channels))
    mae, figures = pretrain_for(job, manifest, config.budget_s * share, _CLOCKS[config.clock])
    accuracy = probe_accuracy(mae.eval(), job.pixels, config, uri, seed)
    return {"recipe": recipe, "share": share, "seed": seed, "budget_s": config.budget_s, "top1": accuracy, **figures}


def pretrain_for(
    job: PretrainJob, manifest: Manifest, budget_s: float, clock: Callable[[], float]
) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """Pretrain until `budget_s` seconds of the clock are spent; return the model and the run's numbers.

    The learning rate follows the share of the budget that is spent, so that every run completes its schedule; so does
    the size of the images where it grows, window by window.
    """
    config, dataset = job.config, index_dataset(job, manifest)
    plan = train_plan(job, dataset)
    mae = build_mae(config.model, config.seed)
    peak = peak_lr(config.optim.base_lr, config.data.batch)
    state = TrainState(
        model=mae,
        optimizer=build_optimizer(mae, config.optim, peak),
        schedule=Schedule(
            peak_lr=peak,
            min_lr=config.optim.min_lr,
            warmup_steps=round(_SCHEDULE_STEPS * config.optim.warmup_epochs / config.epochs),
            total_steps=_SCHEDULE_STEPS,
        ),
        clip_norm=config.optim.clip_norm,
    )
    mae.add_sizes(config.progressive.sizes_px(config.model))
    losses, in_steps_s, start_s, spent_share = [], 0.0, clock(), 0.0
    feed = _steps(job, segments(job, dataset, 0)[0], lambda: spent_share)
    while (begin_s := clock()) - start_s < budget_s:
        spent_share = (begin_s - start_s) / budget_s
        step, batches = next(feed)
        read_s = clock()
        loss = sum(_backward(job, mae, batch, step // plan.steps_per_epoch, plan.planned(step)) for batch in batches)
        state.step = int(_SCHEDULE_STEPS * spent_share)
        state.update()
        losses.append(float(loss))
        in_steps_s += clock() - read_s
    spent_s = clock() - start_s
    return mae, {
        "steps": len(losses),
        "masked_images": len(losses) * config.data.batch,
        "loss": float(np.mean(losses[-20:])) if losses else None,
        "data_share": 1 - in_steps_s / spent_s if losses else None,
        "spent_s": spent_s,
    }


def _steps(
    job: PretrainJob, segment: FeedSegment, spent_share: Callable[[], float]
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield each step with its micro-batches, for ever; a window has the size of images that is due when it is read."""

    def window(number: int) -> Iterator[MicroBatch]:
        size = job.config.progressive.size_at(spent_share(), job.config.model)
        transform = dataclasses.replace(segment.transform, image_px=size)
        endless = dataclasses.replace(segment, last_step=2**40, transform=transform)
        return window_micro_batches(endless, number)

    batches = (batch for number in count() for batch in window(number))
    return ((step, list(some)) for step, some in groupby(batches, key=lambda batch: batch.step))


def _backward(job: PretrainJob, mae: MaskedAutoencoder, batch: MicroBatch, epoch: int, planned: int) -> float:
    """Accumulate the gradients of a micro-batch; return its share of the step's mean loss."""
    config, (height_px, width_px) = job.config, batch.images.shape[1:3]
    mask = training_masks(
        dataclasses.replace(config.model, image_px=(height_px, width_px)),
        seed=config.seed,
        epoch=epoch,
        sample_ids=batch.ids,
        masks_per_image=config.views_per_image,
        complementary=config.complementary_masks,
    )
    loss = pretrain_loss(mae, pixels_to_input(batch.images, job.pixels), mask, batch.weights) / planned
    loss.backward()
    return float(loss.detach())


def table(found: list[dict[str, Any]]) -> str:
    """Format the accuracy of every recipe and share of the budget: the mean over seeds, then each seed's."""
    lines = [f"{'recipe':<20}{'share':>6}{'masked images':>15}{'data':>7}{'top-1':>8}  seeds"]
    for recipe, share in sorted({(r["recipe"], r["share"]) for r in found}, key=lambda key: (key[1], key[0])):
        runs = [r for r in found if (r["recipe"], r["share"]) == (recipe, share)]
        images = round(float(np.mean([r["masked_images"] for r in runs])))
        waits = float(np.mean([r["data_share"] or 0.0 for r in runs]))
        top1 = [r["top1"] for r in runs]
        seeds = " ".join(f"{value:.1f}" for value in top1)
        lines.append(f"{recipe:<20}{share:>6g}{images:>15,}{waits:>7.1%}{np.mean(top1):>8.2f}  {seeds}")
    return "\n".join(lines)
