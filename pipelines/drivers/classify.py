"""`mae finetune` and `mae probe`: train and evaluate a classifier on a registered backbone or a random encoder."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, Literal

from mae_core.config import LAYER_NORM_EPS, ModelConfig, Size, parse_arch, patch_grid
from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.config import ClassifyConfig, from_dict, run_name
from pipelines.dataset.manifest import Manifest, check_value_range
from pipelines.drivers.drive import Publish, PublishedJob, drive, read_export
from pipelines.drivers.pretrain import open_dataset, pixels_of
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob
from pipelines.runs.plans import IndexedDataset, index_dataset, train_plan
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

_RANDOM = "random:"


@dataclass(frozen=True, kw_only=True)
class StartingEncoder:
    """The encoder that a classifier starts from: a registered backbone, or a randomly initialized one."""

    arch: str
    image_px: Size
    channels: int
    pixels: Normalization
    ref: registry.ModelRef | None
    """Model version of the backbone; None for a random encoder."""
    encoder: bytes
    """Content of encoder.safetensors; empty for a random encoder."""
    backbone_px: Size
    """Image size that the encoder was pretrained at."""
    norm_eps: float = LAYER_NORM_EPS


def finetune(config: ClassifyConfig, preset: str = "finetune", *, fresh: bool = False) -> dict[str, Any]:
    """Fine-tune a backbone, or train from scratch; evaluate and register the classifier; return the run's outcome.

    An interrupted run resumes and a finished one repeats its outcome. The backbone's alias is resolved first and
    its version pinned, so that a moved alias starts another run. Raises UserError for wrong input, before anything
    is written, and RunFailed if the worker group fails.
    """
    return _run(config, "finetune", preset, fresh=fresh)


def probe(config: ClassifyConfig, preset: str = "probe", *, fresh: bool = False) -> dict[str, Any]:
    """Train a linear classifier on a backbone's frozen features; evaluate it and return the run's outcome.

    Nothing is registered. Resumes and raises like `finetune`.
    """
    return _run(config, "probe", preset, fresh=fresh)


def _run(config: ClassifyConfig, method: Literal["finetune", "probe"], preset: str, *, fresh: bool) -> dict[str, Any]:
    if config.classifier.command != method:
        raise UserError(
            f"classifier.method is {config.classifier.method!r} but the function is {method}(); "
            f"call {config.classifier.command}()"
        )
    config, manifest = with_labelled_dataset(config)
    tracking = registry.open_tracking(config.tracking.experiment)
    config, ref = with_pinned_backbone(config, tracking)
    start = starting_encoder(config, ref, tracking, manifest)
    published = published_classify_job(config, run_name(config, preset, manifest.digest), start, manifest)
    if "mae.num_train" in published.tags:
        asked = config.labels or f"{config.data.labels_per_class} per class"
        num_all, num_classes = manifest.split("train").num_rows, len(manifest.classes)
        log.info(
            "labels: %s, %s of %d training images of %d classes",
            asked, published.tags["mae.num_train"], num_all, num_classes,
        )  # fmt: skip
    return drive([published], published.name, tracking, fresh=fresh)[0]


def with_pinned_backbone(
    config: ClassifyConfig, tracking: registry.Tracking
) -> tuple[ClassifyConfig, registry.ModelRef | None]:
    """Return the config with the backbone's alias replaced by its current version, and that version; None if random."""
    if config.backbone.startswith(_RANDOM):
        return config, None
    ref = tracking.resolve(config.backbone)
    return dataclasses.replace(config, backbone=ref.uri), ref


def with_labelled_dataset(config: ClassifyConfig) -> tuple[ClassifyConfig, Manifest]:
    """Open the config's dataset; return the config with its absolute URI, and its manifest.

    Raises UserError if the dataset has no labels or lacks the split to evaluate on.
    """
    uri, manifest = open_dataset(config.data.uri)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))
    if not manifest.is_labelled:
        raise UserError(
            f"dataset {config.data.uri} is unlabelled, but a classifier needs labels; {manifest.how_to_label}"
        )
    if manifest.label_sets and config.classifier.command != "finetune":
        raise UserError(
            f"dataset {config.data.uri} has several classes an image, which only `mae finetune` trains on; fine-tune "
            "with --classifier.train-blocks 0 for a linear head, or prepare its source without --multi-label"
        )
    if len(manifest.classes) == 1 and not manifest.label_sets:
        raise UserError(
            f"dataset {config.data.uri} has one class, {manifest.classes[0]}: any classifier would be right on every "
            f"image; prepare a source that has images of other classes too"
        )
    for split in ("train", config.eval_split):
        _check_split(config.data.uri, manifest, split)
    return config, manifest


def _check_split(uri: str, manifest: Manifest, split: str) -> None:
    """Raise UserError, with a way out, if the dataset lacks the split or labels in it."""
    others = [name for name in ("val", "test") if name in manifest.splits and _num_labelled(manifest, name)]
    is_training, try_other = split == "train", f"try --eval-split {others[0]}" if others else ""
    if split not in manifest.splits:
        hold_out = (
            "prepare its source into another folder with --hold-out stratified, which holds out some images of every "
            "class, or with a folder val/"
        )
        remedy = "prepare a source with images to train on" if is_training else try_other or hold_out
        raise UserError(
            f"dataset {uri} has no split {split!r} to {'train' if is_training else 'evaluate'} on; {remedy}"
        )
    if not _num_labelled(manifest, split):
        remedy = manifest.how_to_label if is_training else try_other or manifest.how_to_label
        num = manifest.splits[split].num_rows
        raise UserError(f"the {num} images of split {split!r} of {uri} are unlabelled; {remedy}")


def _num_labelled(manifest: Manifest, split: str) -> int:
    return manifest.splits[split].num_rows - manifest.num_unlabelled.get(split, 0)


def starting_encoder(
    config: ClassifyConfig, ref: registry.ModelRef | None, tracking: registry.Tracking, manifest: Manifest
) -> StartingEncoder:
    """Fetch the backbone from the registry, or describe a random encoder.

    Raises UserError if model, image size and dataset do not fit together.
    """
    if ref is None:
        arch = config.backbone.removeprefix(_RANDOM)
        image_px = config.image_px or manifest.image_px
        if image_px is None:
            raise UserError(f"images of dataset {config.data.uri} differ in size; try --image-px 224 224")
        patch_grid(image_px, parse_arch(arch).patch_px)
        return StartingEncoder(
            arch=arch,
            image_px=image_px,
            channels=manifest.channels,
            pixels=pixels_of(manifest, manifest.channels),
            ref=None,
            encoder=b"",
            backbone_px=image_px,
        )
    remedy = "try a backbone such as models:/mae-vit_base_patch16"
    files = registry.read_model(ref.uri, "encoder.safetensors", remedy=remedy, tracking=tracking)
    model = from_dict(ModelConfig, files.values["model"])
    image_px = config.image_px or model.image_px
    patch_grid(image_px, model.patch_px)
    if manifest.channels not in (1, model.channels):
        raise UserError(
            f"dataset {config.data.uri} has {manifest.channels} channels but {ref.uri} takes {model.channels}; "
            "try a backbone that was pretrained on such images"
        )
    pixels = from_dict(Normalization, files.values["pixels"])
    check_value_range(config.data.uri, manifest, pixels, ref.uri)
    return StartingEncoder(
        arch=model.arch,
        image_px=image_px,
        channels=model.channels,
        pixels=pixels,
        ref=ref,
        encoder=files.weights,
        backbone_px=model.image_px,
        norm_eps=model.norm_eps,
    )


def published_classify_job(
    config: ClassifyConfig, name: str, start: StartingEncoder, manifest: Manifest
) -> PublishedJob:
    """Return the run as a job to publish.

    Publishing a fine-tuned classifier registers it, unless the config says not to. Raises UserError if more blocks
    are to be trained than the encoder has, or if a class has fewer images than the labels to train on.
    """
    depth, train_blocks = parse_arch(start.arch).depth, config.classifier.train_blocks
    if train_blocks is not None and train_blocks > depth:
        raise UserError(f"train_blocks {train_blocks:g} exceeds the {depth} blocks of {start.arch}; try {depth}")
    storage = open_storage(open_storage(config.output).join(name))
    # Workers read the weights from the run folder, so that only the driver talks to MLflow.
    inputs = {"backbone/encoder.safetensors": start.encoder} if start.encoder else {}
    job = ClassifyJob(
        folder=storage.uri,
        config=config,
        arch=start.arch,
        image_px=start.image_px,
        channels=start.channels,
        pixels=start.pixels,
        classes=tuple(manifest.classes),
        backbone=storage.join("backbone") if start.encoder else "",
        backbone_px=start.backbone_px,
        norm_eps=start.norm_eps,
        label_sets=tuple(map(tuple, manifest.label_sets)),
    )
    dataset, command = index_dataset(job, manifest), config.classifier.command
    publish = _register(config, start) if command == "finetune" and config.tracking.register else _publish_nothing
    return PublishedJob(
        name=name,
        kind=command,
        job=job,
        dataset=dataset,
        publish=publish,
        backbone=start.ref,
        inputs=inputs,
        tags={**config.tracking.tag_values, **_label_tags(job, dataset)},
    )


def _label_tags(job: ClassifyJob, dataset: IndexedDataset) -> dict[str, str]:
    """Return how many labelled images the job trains on, as tags of its run; empty if it uses all."""
    if not job.config.labels and job.config.data.labels_per_class is None:
        return {}
    return {"mae.num_train": str(train_plan(job, dataset).num_samples)}


def _register(config: ClassifyConfig, start: StartingEncoder) -> Publish:
    def publish(run: registry.Run, folder: RunFolder) -> dict[str, Any]:
        name = config.tracking.name or ("" if start.ref else f"scratch-{start.arch}-classifier")
        result = folder.read_result() or {}
        ref = registry.register_classifier(
            run,
            read_export(folder, "classifier.safetensors", "config.json"),
            start.ref,
            name,
            description=f"{_measured(result)} on {result.get('split')}",
            tags=config.tracking.tag_values,
        )
        return {"model": ref.uri, "backbone": config.backbone}

    return publish


def _measured(result: dict[str, Any]) -> str:
    return f"mAP {result['map']} %" if "map" in result else f"top-1 {result.get('top1')} %"


def _publish_nothing(run: registry.Run, folder: RunFolder) -> dict[str, Any]:
    return {}
