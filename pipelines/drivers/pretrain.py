"""`mae pretrain`: pretrain an MAE on a prepared dataset and register it.

Drivers import torch only where they read weights: it costs seconds before a command starts anything.
"""

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mae_core.config import ModelConfig
from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.config import PeriodicEvaluationConfig, PretrainConfig, from_dict, run_name, to_dict, with_overrides
from pipelines.dataset.manifest import MANIFEST, Manifest, check_value_range, is_prepared, read_manifest
from pipelines.drivers.drive import Publish, PublishedJob, drive, manifest_json, newest_picture, read_export
from pipelines.drivers.extend import ExtendedRun, describe_extension, extension_name, read_finished_run
from pipelines.evaluation.subset import check_num_images
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import index_dataset, train_plan
from pipelines.storage import open_storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """The model version that pretraining continues from, and its files."""

    ref: registry.ModelRef
    files: registry.ModelFiles
    """With mae.safetensors or, for a version without a decoder, encoder.safetensors."""
    model: ModelConfig
    pixels: Normalization

    @property
    def inputs(self) -> dict[str, bytes]:
        """Files of the run folder, from which workers read the weights, so that only the driver talks to MLflow."""
        return {f"backbone/{name}": content for name, content in self.files.contents.items()}


def pretrain(
    config: PretrainConfig,
    preset: str = "pretrain",
    *,
    fresh: bool = False,
    stated: Collection[str] | None = None,
) -> dict[str, Any]:
    """Pretrain and register an MAE; return the run's outcome: folder, MLflow run, final loss and model version.

    An interrupted run resumes and a finished one repeats its outcome; `fresh` deletes it first. With
    `config.backbone`, the weights of that version are the initial ones; its alias is resolved first, so that a moved
    alias starts another run. `stated` names the fields of `config.model` that replace the version's own, such as
    "image_px" or "mask.ratio"; None means all. With `config.extend`, which `extension_of` sets, the run continues after
    the end of that run. With `config.data.cache`, the first epoch trains while the dataset is being prepared there
    (`pipelines.drivers.preparing`). Raises UserError for wrong input, before anything is written, and RunFailed if the
    worker group fails.
    """
    if config.data.cache:
        from pipelines.drivers.preparing import pretrain_while_preparing

        return pretrain_while_preparing(config, preset, fresh=fresh, stated=stated)
    published, tracking = _planned(config, preset, stated)
    return drive([published], published.name, tracking, fresh=fresh)[0]


def estimate_pretraining(
    config: PretrainConfig,
    preset: str = "pretrain",
    *,
    price: float | None = None,
    stated: Collection[str] | None = None,
) -> dict[str, Any]:
    """Estimate what the same call of `pretrain` will take, without starting it; see `pipelines.drivers.estimate`."""
    from pipelines.drivers.estimate import estimate

    config.data.refuse_cache("an estimate")
    published, _ = _planned(config, preset, stated)
    return estimate(published, price)


def _planned(
    config: PretrainConfig, preset: str, stated: Collection[str] | None
) -> tuple[PublishedJob, registry.Tracking]:
    """Return the run that the config describes, as a job to publish, and the MLflow to use."""
    _refuse_unprepared(config.data.uri)
    uri, manifest = open_dataset(config.data.uri)
    extended = read_finished_run(config.extend, config.output) if config.extend else None
    if extended is not None:
        extended.check(config, manifest)
    tracking = registry.open_tracking(config.tracking.experiment)
    if extended is None:
        config, start = with_starting_weights(config, tracking, stated)
        config = on_dataset(config, uri, manifest)
        published = published_pretrain_job(config, run_name(config, preset, manifest.digest), manifest, start)
    else:
        config = dataclasses.replace(on_dataset(config, uri, manifest), extend=extended.folder.storage.uri)
        published = published_extension(config, extended, manifest, extended.model_version(tracking))
    return published, tracking


def _refuse_unprepared(uri: str) -> None:
    """Raise UserError with both remedies if the URI names no prepared dataset."""
    if uri and not is_prepared(open_storage(uri)):
        raise UserError(
            f"{uri} is not a prepared dataset (it has no {MANIFEST}); run `mae prepare {uri} FOLDER` and train on "
            "FOLDER, or add --data.cache FOLDER, in which the first epoch prepares it"
        )


def with_starting_weights(
    config: PretrainConfig, tracking: registry.Tracking, stated: Collection[str] | None = None
) -> tuple[PretrainConfig, StartingWeights | None]:
    """Return the config with its backbone pinned to a version, and that version's weights; None if random.

    Fields of `config.model` that are not among `stated` become those of the version. Raises UserError if there is no
    such version, or if it has no encoder of the config's width and depth.
    """
    if not config.backbone:
        return config, None
    from mae_core.model import build_mae
    from mae_core.transfer import start_from

    remedy = "try a backbone such as models:/mae-vit_base_patch16"
    names = ("mae.safetensors", "encoder.safetensors")
    files = registry.read_model(config.backbone, *names, remedy=remedy, tracking=tracking)
    assert files.ref is not None, "the config refuses folders"
    given = from_dict(ModelConfig, files.values["model"])
    model = config.model
    if stated is not None:
        mine = to_dict(config.model)
        model = with_overrides(given, {dotted: _nested(mine, dotted) for dotted in stated})
    transfer = start_from(build_mae(model, seed=0), files.tensors, given)
    log.info(
        "continuing from %s: %d tensors taken, %d adapted%s, %d initialized%s",
        files.shown, len(transfer.taken), len(transfer.adapted), _listed(transfer.adapted), len(transfer.initial),
        _listed(transfer.initial),
    )  # fmt: skip
    pixels = from_dict(Normalization, files.values["pixels"])
    start = StartingWeights(ref=files.ref, files=files, model=given, pixels=pixels)
    return dataclasses.replace(config, backbone=files.shown, model=model), start


def _nested(values: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def with_dataset(config: PretrainConfig) -> tuple[PretrainConfig, Manifest]:
    """Open the config's dataset; return the config with its absolute URI, and its manifest.

    Raises UserError if the dataset does not exist or its channels do not fit the model.
    """
    uri, manifest = open_dataset(config.data.uri)
    return on_dataset(config, uri, manifest), manifest


def on_dataset(config: PretrainConfig, uri: str, manifest: Manifest) -> PretrainConfig:
    """Return the config with the dataset's absolute URI. Raises UserError if its channels do not fit the model."""
    if manifest.channels not in (1, config.model.channels):
        raise UserError(
            f"dataset {config.data.uri} has {manifest.channels} channels but model.channels is "
            f"{config.model.channels}; try --model.channels {manifest.channels}"
        )
    if config.evaluate.every_epochs:
        _check_evaluation(config.evaluate, manifest)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))


def _check_evaluation(config: PeriodicEvaluationConfig, manifest: Manifest) -> None:
    """Say what an evaluation can tell on this dataset. Raises UserError if it has more classes than images."""
    check_num_images(manifest, config.images)
    if not manifest.has_single_labels:
        found = "has several classes an image" if manifest.is_labelled else "has no labels"
        log.info("the dataset %s: the evaluations while pretraining compute RankMe alone", found)
    elif config.knn:
        log.warning(
            "kNN says little of MAE: a ViT-B after 100 epochs has 11.2 % by kNN, 46.0 % by a linear probe and 81.3 % "
            "fine-tuned; judge by evaluate/linear_top1"
        )


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
    values = manifest.values.range if manifest.values else None
    return Normalization(mean=tuple(manifest.mean) * repeat, std=tuple(manifest.std) * repeat, values=values)


def published_pretrain_job(
    config: PretrainConfig, name: str, manifest: Manifest, start: StartingWeights | None = None, listed: str = ""
) -> PublishedJob:
    """Return the run as a job to publish; publishing registers the model unless the config says not to.

    `listed` is what `PretrainJob.listed` says. A run that continues from a version keeps its normalization, which its
    weights expect, unless channels differ. Raises UserError if a class has fewer images than the labels to train on.
    """
    storage = open_storage(open_storage(config.output).join(name))
    pixels = pixels_of(manifest, config.model.channels)
    if start is not None and start.model.channels == config.model.channels:
        check_value_range(config.data.uri, manifest, start.pixels, start.ref.uri)
        pixels = start.pixels
    job = PretrainJob(
        folder=storage.uri,
        config=config,
        pixels=pixels,
        backbone=storage.join("backbone") if start else "",
        listed=listed,
    )
    return PublishedJob(
        name=name,
        kind="pretrain",
        job=job,
        dataset=index_dataset(job, manifest),
        publish=publisher(config, manifest, start.ref if start else None),
        inputs=start.inputs if start else {},
        backbone=start.ref if start else None,
        tags=config.tracking.tag_values,
    )


def published_extension(
    config: PretrainConfig, run: ExtendedRun, manifest: Manifest, parent: registry.ModelRef | None
) -> PublishedJob:
    """Return a job to publish that continues after the run's end; `parent` is the version that the run registered.

    Raises UserError if the run has lost its last checkpoint, or if the extension would lie in its folder.
    """
    name = extension_name(config, run)
    folder = open_storage(open_storage(config.output).join(name)).uri
    job = PretrainJob(folder=folder, config=config, pixels=run.pixels, extended=run.extended())
    dataset = index_dataset(job, manifest)
    steps_per_epoch = train_plan(job, dataset).steps_per_epoch
    summary = describe_extension(config, run)
    log.info("%s: %s", name, summary)
    register = publisher(config, manifest, parent, f"; {summary}")
    added = {"extends": run.folder.storage.uri, "parent": parent.uri if parent else ""}
    return PublishedJob(
        name=name,
        kind="pretrain",
        job=job,
        dataset=dataset,
        publish=lambda mlflow_run, run_folder: added | register(mlflow_run, run_folder),
        first_checkpoint=run.last_checkpoint(job.first_epoch * steps_per_epoch, steps_per_epoch),
        backbone=parent,
        tags={**config.tracking.tag_values, **run.tags},
    )


def publisher(
    config: PretrainConfig, manifest: Manifest, parent: registry.ModelRef | None = None, more: str = ""
) -> Publish:
    """Return the function that registers a run's model, as a child of `parent` if given, unless the config opts out.

    `more` is appended to the description of the version.
    """

    def publish(run: registry.Run, folder: RunFolder) -> dict[str, Any]:
        if not config.tracking.register:
            return {}
        files = read_export(folder, "encoder.safetensors", "mae.safetensors", "config.json")
        files |= {"manifest.json": manifest_json(manifest)} | newest_picture(folder)
        ref = registry.register_backbone(
            run,
            files,
            config.tracking.name or f"mae-{config.model.arch}",
            parent=parent,
            description=describe(config, manifest) + more,
            tags=config.tracking.tag_values,
        )
        return {"model": ref.uri}

    return publish


def describe(config: PretrainConfig, manifest: Manifest) -> str:
    """Describe the run for the registry: model, images, epochs, masks, decoder and dataset."""
    model = config.model
    origin = f", continued from {config.backbone}" if config.backbone else ""
    first_px = config.progressive.first_px
    grown = f", at first of {first_px[0]} x {first_px[1]} px" if first_px else ""
    return (
        f"MAE pretraining of {model.arch} at {model.image_px[0]} x {model.image_px[1]} px on "
        f"{manifest.splits['train'].num_rows:,} images for {config.epochs} epochs{grown}; {model.mask.kind} masks of "
        f"{model.mask.ratio:.0%}, {model.num_visible} of {model.num_patches} patches visible; "
        f"decoder {model.decoder_depth} x {model.decoder_width}; dataset {manifest.digest[:12]}{origin}"
    )
