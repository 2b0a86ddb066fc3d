"""The driver of pretraining: shards become a pretrained, registered MAE."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mae_core.config import Normalization
from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import PretrainConfig, RegisterConfig, from_dict, run_name, to_dict
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.drivers.drive import Task, drive, exported, manifest_json, newest_picture
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.storage import open_storage


def pretrain(config: PretrainConfig, preset: str, *, fresh: bool = False) -> dict[str, Any]:
    """The run's outcome: folder, MLflow run, final loss and model version. Resumes, or repeats a finished outcome.

    Raises UserError for what the user can mend, before anything is written.
    """
    config, manifest = with_dataset(config)
    tracking = registry.open_tracking(config.tracking.experiment)
    task = pretrain_task(config, run_name(config, preset, manifest.digest), manifest)
    return drive([task], task.name, tracking, fresh=fresh)[0]


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


def pretrain_task(config: PretrainConfig, name: str, manifest: Manifest) -> Task:
    """The run as a task; publishing registers the model unless the config says not to."""
    job = PretrainJob(
        folder=open_storage(config.output).join(name),
        config=config,
        pixels=pixels_of(manifest, config.model.channels),
    )

    def publish(run: registry.Run, folder: RunFolder) -> dict[str, Any]:
        if not config.tracking.register:
            return {}
        files = exported(folder, "encoder.safetensors", "mae.safetensors", "config.json")
        files |= {"manifest.json": manifest_json(manifest)} | newest_picture(folder)
        ref = registry.register_backbone(
            run, files, config.tracking.name or f"mae-{config.model.arch}", description=describe(config, manifest)
        )
        return {"model": ref.uri}

    return Task(name=name, kind="pretrain", job=job, manifest=manifest, publish=publish)


def describe(config: PretrainConfig, manifest: Manifest) -> str:
    """What a reader of the registry wants to know first."""
    model = config.model
    return (
        f"MAE pretraining of {model.arch} at {model.image_px[0]} x {model.image_px[1]} px on "
        f"{manifest.splits['train'].num_rows:,} images for {config.epochs} epochs; {model.mask.kind} masks of "
        f"{model.mask.ratio:.0%}, {model.num_visible} of {model.num_patches} patches visible; "
        f"decoder {model.decoder_depth} x {model.decoder_width}; dataset {manifest.digest[:12]}"
    )


def register(run_and_step: str, config: RegisterConfig) -> dict[str, Any]:
    """The run's last checkpoint, or that of RUN@STEP, is a new version of the registered model.

    Nothing but the run's folder is read: the dataset may be gone by now.
    """
    from pipelines.worker.export import backbone_files

    folder, step = _checkpoint_named(run_and_step)
    values, uri = folder.described(), folder.storage.uri
    assert values is not None, "a folder without a run has no checkpoint to name"
    checkpoint = folder.checkpoints.load(step)
    run_config = from_dict(PretrainConfig, json.loads(folder.storage.read("config.json")))
    files: dict[str, bytes | Path] = dict(
        backbone_files(
            run_config.model, from_dict(Normalization, values["job"]["pixels"]), checkpoint.files["model.safetensors"]
        )
    )
    manifest = read_manifest(open_storage(folder.storage.join("dataset")))
    files |= {"manifest.json": manifest_json(manifest)} | newest_picture(folder)
    name = config.name or run_config.tracking.name or f"mae-{run_config.model.arch}"
    tags = {"mae.step": str(step)}
    tracking = registry.open_tracking(config.experiment or run_config.tracking.experiment)
    run = tracking.find_run(values["id"])
    if run is not None:
        ref = registry.register_backbone(run, files, name, tags=tags)
        return {"model": ref.uri, "step": step, "run_id": run.id}
    # This MLflow has never seen the run, such as that of another site.
    run = tracking.run(
        Path(uri).name,
        "pretrain",
        to_dict(run_config),
        dataset=manifest,
        dataset_uri=run_config.data.uri,
        key=values["id"],
    )
    try:
        ref = registry.register_backbone(run, files, name, tags=tags)
    finally:
        run.finish("FINISHED" if folder.result() else "KILLED")
    return {"model": ref.uri, "step": step, "run_id": run.id}


def _checkpoint_named(run_and_step: str) -> tuple[RunFolder, int]:
    """The folder and the step that RUN or RUN@STEP means. Raises UserError where there is no such checkpoint."""
    uri, at, wanted = run_and_step.rpartition("@")
    folder = RunFolder(run_and_step)
    if at and folder.described() is None:
        if not wanted.isdigit():
            raise UserError(f"step {wanted!r} of {run_and_step!r} is not a number; try RUN@STEP, such as {uri}@1000")
        folder = RunFolder(uri)
    else:
        uri, wanted = run_and_step, ""
    values = folder.described()
    if values is None or values.get("kind") != "pretrain":
        raise UserError(f"{uri} is not the folder of a pretraining run; try the folder that `mae pretrain` printed")
    steps = folder.checkpoints.steps()
    if not steps or (wanted and int(wanted) not in steps):
        raise UserError(
            f"run {uri} has no checkpoint {wanted or 'at all'}; it has steps {', '.join(map(str, steps)) or 'none'}"
        )
    return folder, int(wanted or steps[-1])
