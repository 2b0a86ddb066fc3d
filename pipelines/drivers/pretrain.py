"""`mae pretrain`: pretrain an MAE on a prepared dataset and register it."""

import dataclasses
from typing import Any

from mae_core.config import Normalization
from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import PretrainConfig, run_name
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.drivers.drive import PublishedJob, drive, manifest_json, newest_picture, read_export
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.storage import open_storage


def pretrain(config: PretrainConfig, preset: str = "pretrain", *, fresh: bool = False) -> dict[str, Any]:
    """Pretrain and register an MAE; return the run's outcome: folder, MLflow run, final loss and model version.

    An interrupted run resumes and a finished one repeats its outcome; `fresh` deletes it first. Raises UserError for
    wrong input, before anything is written, and RunFailed if the worker group fails.
    """
    config, manifest = with_dataset(config)
    tracking = registry.open_tracking(config.tracking.experiment)
    published = published_pretrain_job(config, run_name(config, preset, manifest.digest), manifest)
    return drive([published], published.name, tracking, fresh=fresh)[0]


def with_dataset(config: PretrainConfig) -> tuple[PretrainConfig, Manifest]:
    """Open the config's dataset; return the config with its absolute URI, and its manifest.

    Raises UserError if the dataset does not exist or its channels do not fit the model.
    """
    uri, manifest = open_dataset(config.data.uri)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))
    if manifest.channels not in (1, config.model.channels):
        raise UserError(
            f"dataset {config.data.uri} has {manifest.channels} channels but model.channels is "
            f"{config.model.channels}; try --model.channels {manifest.channels}"
        )
    return config, manifest


def open_dataset(uri: str) -> tuple[str, Manifest]:
    """Return the dataset's absolute URI, which workers on other machines need, and its manifest.

    Raises UserError if the URI is empty, holds no prepared dataset, or has no training images.
    """
    if not uri:
        raise UserError("no dataset is named; try --data.uri FOLDER with a folder that `mae prepare` wrote")
    storage = open_storage(uri)
    manifest = read_manifest(storage)
    if "train" not in manifest.splits or not manifest.splits["train"].num_rows:
        raise UserError(f"dataset {uri} has no training images; put images in train/ and prepare it again")
    return storage.uri, manifest


def pixels_of(manifest: Manifest, channels: int) -> Normalization:
    """Return the dataset's mean and standard deviation, repeated if gray images are read as `channels` channels."""
    repeat = channels if manifest.channels == 1 else 1
    return Normalization(mean=tuple(manifest.mean) * repeat, std=tuple(manifest.std) * repeat)


def published_pretrain_job(config: PretrainConfig, name: str, manifest: Manifest) -> PublishedJob:
    """Return the run as a job to publish; publishing registers the model unless the config says not to."""
    job = PretrainJob(
        folder=open_storage(config.output).join(name),
        config=config,
        pixels=pixels_of(manifest, config.model.channels),
    )

    def publish(run: registry.Run, folder: RunFolder) -> dict[str, Any]:
        if not config.tracking.register:
            return {}
        files = read_export(folder, "encoder.safetensors", "mae.safetensors", "config.json")
        files |= {"manifest.json": manifest_json(manifest)} | newest_picture(folder)
        ref = registry.register_backbone(
            run, files, config.tracking.name or f"mae-{config.model.arch}", description=describe(config, manifest)
        )
        return {"model": ref.uri}

    return PublishedJob(name=name, kind="pretrain", job=job, manifest=manifest, publish=publish)


def describe(config: PretrainConfig, manifest: Manifest) -> str:
    """Describe the run for the registry: model, images, epochs, masks, decoder and dataset."""
    model = config.model
    return (
        f"MAE pretraining of {model.arch} at {model.image_px[0]} x {model.image_px[1]} px on "
        f"{manifest.splits['train'].num_rows:,} images for {config.epochs} epochs; {model.mask.kind} masks of "
        f"{model.mask.ratio:.0%}, {model.num_visible} of {model.num_patches} patches visible; "
        f"decoder {model.decoder_depth} x {model.decoder_width}; dataset {manifest.digest[:12]}"
    )
