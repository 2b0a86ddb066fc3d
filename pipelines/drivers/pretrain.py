"""`mae pretrain`: a prepared dataset becomes a pretrained, registered MAE."""

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
    """The run's outcome: folder, MLflow run, final loss and model version. Resumes, or repeats a finished outcome.

    Raises UserError for what the user can mend, before anything is written.
    """
    config, manifest = with_dataset(config)
    tracking = registry.open_tracking(config.tracking.experiment)
    published = published_pretrain_job(config, run_name(config, preset, manifest.digest), manifest)
    return drive([published], published.name, tracking, fresh=fresh)[0]


def with_dataset(config: PretrainConfig) -> tuple[PretrainConfig, Manifest]:
    """The config and the dataset it names. Raises UserError where they do not fit each other."""
    uri, manifest = open_dataset(config.data.uri)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))
    if manifest.channels not in (1, config.model.channels):
        raise UserError(
            f"dataset {config.data.uri} has {manifest.channels} channels but model.channels is "
            f"{config.model.channels}; try --model.channels {manifest.channels}"
        )
    return config, manifest


def open_dataset(uri: str) -> tuple[str, Manifest]:
    """The dataset's absolute URI, since workers stand elsewhere, and its manifest.

    Raises UserError where no dataset is named, prepared or fit for training.
    """
    if not uri:
        raise UserError("no dataset is named; try --data.uri FOLDER with a folder that `mae prepare` wrote")
    storage = open_storage(uri)
    manifest = read_manifest(storage)
    if "train" not in manifest.splits or not manifest.splits["train"].num_rows:
        raise UserError(f"dataset {uri} has no training images; put images in train/ and prepare it again")
    return storage.uri, manifest


def pixels_of(manifest: Manifest, channels: int) -> Normalization:
    """The dataset's mean and std, repeated where gray images are read in three channels."""
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
    """What a reader of the registry wants to know first."""
    model = config.model
    return (
        f"MAE pretraining of {model.arch} at {model.image_px[0]} x {model.image_px[1]} px on "
        f"{manifest.splits['train'].num_rows:,} images for {config.epochs} epochs; {model.mask.kind} masks of "
        f"{model.mask.ratio:.0%}, {model.num_visible} of {model.num_patches} patches visible; "
        f"decoder {model.decoder_depth} x {model.decoder_width}; dataset {manifest.digest[:12]}"
    )
