"""A run folder as a finished pretraining run leaves it, written by the functions that a driver calls, without Ray."""

from typing import Any

from mae_core.normalization import Normalization
from pipelines.config import FixedCompute, PretrainConfig
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.drive import claim
from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Extended, PretrainJob
from pipelines.storage import open_storage

MANIFEST = Manifest(
    channels=3, image_px=None, classes=[], splits={}, num_found=0, num_ok=0, num_quarantined=0, num_duplicates=0,
    quarantine_reasons={}, mean=[0.4] * 3, std=[0.3] * 3, config={}, source_digest="",
)  # fmt: skip
"""Manifest of a dataset that only its run folder knows."""


def finished_run(
    config: PretrainConfig,
    manifest: Manifest = MANIFEST,
    *,
    steps_per_epoch: int = 3,
    extended: Extended | None = None,
    chosen: FixedCompute | None = None,
    **outcome: Any,
) -> RunFolder:
    """Write the run with the config's name and output, with an empty checkpoint after its last step."""
    folder = open_storage(open_storage(config.output).join(config.name)).uri
    pixels = Normalization(mean=tuple(manifest.mean), std=tuple(manifest.std))
    job = PretrainJob(folder=folder, config=config, pixels=pixels, extended=extended, chosen=chosen or FixedCompute())
    claim(job, "pretrain", manifest)
    run, steps = RunFolder(folder), (job.first_epoch + job.reading.epochs) * steps_per_epoch
    meta = {"steps_per_epoch": steps_per_epoch, "last": {"train/loss": 0.5}}
    run.checkpoints.save(Checkpoint(step=steps, files={}, meta=meta), Retention(newest=1))
    run.mark_trained({"steps": steps})
    run.mark_published({"run": config.name, "run_id": "0" * 32, "folder": folder, "steps": steps, **outcome})
    return run
