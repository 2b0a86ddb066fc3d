"""`mae segment`: a linear segmentation probe on frozen patch tokens, from pairs of images and masks to mIoU.

1. Stretch each image to the encoder's input and encode it once; parts of tokens are kept in OUT/features.
2. Train a linear layer on the tokens; the state after each epoch is kept in OUT/training.safetensors.
3. Upsample the logits of each validation image to its mask's own size and count pixels.

The price: tokens of all images are held in memory as float16, 0.3 MB per image for a ViT-B at 224 px.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError
from mae_core.pretrained import Encoder
from mae_core.randomness import Purpose, seed_of
from mae_core.segmentation import (
    IGNORE,
    SegmentationHead,
    intersection_over_union,
    pixel_confusion,
    segmentation_loss,
    upsample,
)
from mae_core.state import load_optimizer_tensors, model_tensors, optimizer_tensors, pack, unpack
from pipelines.config import SegmentConfig, to_dict
from pipelines.evaluation.models import OpenedEncoder, device_of, needed_tracking, open_encoder
from pipelines.evaluation.outputs import claim, log_run, write_files
from pipelines.evaluation.pairs import Pair, Pairs, batches, read_mask, read_pairs
from pipelines.images.decode import ImageArray, decode, unit_pixels, views
from pipelines.pictures.token_figures import Panel, as_color, panel_sheet, segment_colors, segments
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_IDENTITY, _TRAINING = "segmentation.json", "training.safetensors"
_IMAGES_PER_PART = 64
_MOST_IN_LEGEND = 30
_KEEP_EVERY_S = 20.0


def segment(data: str, out: str, config: SegmentConfig) -> dict[str, Any]:
    """Train the probe, measure it on the validation images, and write result.json, segments.png and head.safetensors.

    The same command resumes after the last part of the tokens and the last epoch. Raises UserError for pairs that do
    not fit together, and if `out` holds something else.
    """
    tracking = needed_tracking(config.model, config.experiment, log=config.log)
    device = device_of(gpu=config.gpu)
    opened = open_encoder(config.model, tracking, config.image_px, device)
    source, storage = open_storage(data), open_storage(out)
    pairs = read_pairs(source, val_fraction=config.val_fraction, seed=config.seed)
    kept = {
        key: value
        for key, value in to_dict(config).items()
        if key not in ("model", "gpu", "log", "experiment", "num_pictures")
    }
    identity = {"model": opened.digest, "data": pairs.digest, "config": kept}
    claim(storage, _IDENTITY, identity, "segmentation probe")
    tokens = {
        name: _tokens(opened.encoder, source, storage, name, found)
        for name, found in (("train", pairs.train), ("val", pairs.val))
    }
    masks = _input_masks(source, pairs.train, opened.encoder.image_px)
    head = _train(config, opened.encoder, tokens["train"], masks, len(pairs.classes), storage, device)
    confusion, picture = _evaluate(config, opened.encoder, head, tokens["val"], source, pairs, device)
    result = _result(config, opened, data, pairs, confusion)
    files = {"segments.png": picture, "head.safetensors": pack(model_tensors(head))}
    if tracking is not None and config.log:
        params = to_dict(config) | {"data": data}
        points = {"val/miou": result["miou"], "val/pixel_accuracy": result["pixel_accuracy"]}
        result["run_id"] = log_run(tracking, "segment", params, identity, opened, files, result, metrics=points)
    result["out"] = storage.uri
    write_files(storage, files, result)
    return result | {"text": _text(result)}


def _tokens(encoder: Encoder, source: Storage, storage: Storage, split: str, pairs: Sequence[Pair]) -> Tensor:
    """Return the patch tokens of all images [images patches features], encoding only the parts that are missing."""
    parts, said_s = [], time.monotonic()
    for number, some in enumerate(batches(pairs, _IMAGES_PER_PART)):
        path = f"features/{split}-{number:05d}.safetensors"
        if not storage.exists(path):
            storage.write(path, pack({"tokens": _encode(encoder, source, some)}))
        parts.append(unpack(storage.read(path))["tokens"])
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            log.info("%d of %d images of %s encoded", number * _IMAGES_PER_PART + len(some), len(pairs), split)
    return torch.cat(parts)


@torch.inference_mode()
def _encode(encoder: Encoder, source: Storage, pairs: Sequence[Pair], batch: int = 8) -> Tensor:
    device = next(encoder.parameters()).device
    found = []
    for some in batches(pairs, batch):
        images = np.stack([_stretched(_image(source, pair, encoder), encoder.image_px) for pair in some])
        found.append(encoder.tokens(torch.from_numpy(images).to(device))[:, encoder.config.class_tokens :].half().cpu())
    return torch.cat(found)


def _image(source: Storage, pair: Pair, encoder: Encoder) -> ImageArray:
    content, values = source.read(pair.image), encoder.normalization.values
    return decode(content, encoder.channels) if values is None else unit_pixels(content, encoder.channels, values)


def _stretched(pixels: ImageArray, size_px: Size) -> ImageArray:
    """Resize the whole image, whatever its aspect, so that every pixel of its mask is predicted."""
    if pixels.dtype != np.uint8:
        return views.resized(pixels, size_px)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((size_px[1], size_px[0]), Image.Resampling.BICUBIC))
    return resized.reshape(*size_px, pixels.shape[2])


def _input_masks(source: Storage, pairs: Sequence[Pair], size_px: Size) -> Tensor:
    """Return the training masks at the size of the input, by the nearest pixel: uint8 [images height width]."""
    masks = []
    for pair in pairs:
        mask = Image.fromarray(read_mask(source.read(pair.mask)).astype(np.uint8))
        masks.append(np.asarray(mask.resize((size_px[1], size_px[0]), Image.Resampling.NEAREST)))
    return torch.from_numpy(np.stack(masks))


def _train(
    config: SegmentConfig,
    encoder: Encoder,
    tokens: Tensor,
    masks: Tensor,
    num_classes: int,
    storage: Storage,
    device: torch.device,
) -> SegmentationHead:
    """Train the head from the last epoch that was kept."""
    torch.manual_seed(seed_of(config.seed, Purpose.INIT, 2))
    head = SegmentationHead(tokens.shape[-1], num_classes, encoder.config.grid).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps_per_epoch = math.ceil(len(tokens) / config.batch)
    first, kept_s, loss = _resume(head, optimizer, storage), time.monotonic(), torch.zeros(())
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(seed_of(config.seed, Purpose.ROWS, epoch))
        order = torch.randperm(len(tokens), generator=generator)
        for i, rows in enumerate(order.split(config.batch)):
            done = (epoch * steps_per_epoch + i) / (config.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
            logits = head(tokens[rows].to(device).float())
            loss = segmentation_loss(logits, masks[rows].to(device).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch + 1 == config.epochs or time.monotonic() - kept_s > _KEEP_EVERY_S:
            kept_s = time.monotonic()
            _keep(head, optimizer, storage, epoch + 1)
            log.info("epoch %d of %d, loss %.4f", epoch + 1, config.epochs, loss.item())
    return head.eval()


def _keep(head: SegmentationHead, optimizer: torch.optim.Optimizer, storage: Storage, epoch: int) -> None:
    state = {f"optimizer:{name}": tensor for name, tensor in optimizer_tensors(optimizer, head).items()}
    state |= {f"model:{name}": tensor for name, tensor in model_tensors(head).items()}
    storage.write(_TRAINING, pack(state | {"epoch": torch.tensor(epoch)}))


def _resume(head: SegmentationHead, optimizer: torch.optim.Optimizer, storage: Storage) -> int:
    """Restore what `_keep` wrote, if anything; return the number of epochs done."""
    if not storage.exists(_TRAINING):
        return 0
    state = unpack(storage.read(_TRAINING))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in state.items():
        kind, _, rest = name.partition(":")
        if rest:
            parts[kind][rest] = tensor
    head.load_state_dict(parts["model"])
    load_optimizer_tensors(optimizer, head, parts["optimizer"])
    return int(state["epoch"])


@torch.inference_mode()
def _evaluate(
    config: SegmentConfig,
    encoder: Encoder,
    head: SegmentationHead,
    tokens: Tensor,
    source: Storage,
    pairs: Pairs,
    device: torch.device,
) -> tuple[Tensor, bytes]:
    """Return pixels by true and predicted class over all validation images, and the picture of some."""
    num_classes = len(pairs.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    count = min(config.num_pictures, len(pairs.val))
    shown = set(np.linspace(0, len(pairs.val) - 1, count).round().astype(int).tolist())
    rows = []
    for i, pair in enumerate(pairs.val):
        truth = read_mask(source.read(pair.mask))
        logits = head(tokens[i : i + 1].to(device).float())
        predicted = upsample(logits, (truth.shape[0], truth.shape[1])).argmax(1)[0].cpu()
        confusion += pixel_confusion(torch.from_numpy(truth), predicted, num_classes)
        if i in shown:
            rows.append((pair.image, _panels(_image(source, pair, encoder), predicted.numpy(), truth, num_classes)))
    legend = list(zip(pairs.classes, segment_colors(num_classes))) if num_classes <= _MOST_IN_LEGEND else []
    return confusion, panel_sheet(rows, 3, legend)


def _panels(
    image: ImageArray, predicted: NDArray[np.integer], truth: NDArray[np.integer], num_classes: int
) -> list[Panel]:
    colors = segment_colors(num_classes)
    return [
        Panel("image", as_color(image)),
        Panel("prediction", segments(predicted, colors, IGNORE)),
        Panel("truth", segments(truth, colors, IGNORE)),
    ]


def _result(config: SegmentConfig, opened: OpenedEncoder, data: str, pairs: Pairs, confusion: Tensor) -> dict[str, Any]:
    overlaps = intersection_over_union(confusion)
    present = {name: 100 * iou for name, iou in zip(pairs.classes, overlaps.tolist()) if not math.isnan(iou)}
    total = int(confusion.sum())
    if not total:
        raise UserError(f"every pixel of the {len(pairs.val)} validation masks is ignored; try another --seed")
    return {
        "model": opened.shown,
        "data": data,
        "num_train": len(pairs.train),
        "num_val": len(pairs.val),
        "num_undecodable": len(pairs.failed),
        "undecodable": pairs.failed,
        "miou": sum(present.values()) / len(present),
        "pixel_accuracy": 100 * int(confusion.diagonal().sum()) / total,
        "iou": present,
        "absent_classes": [name for name in pairs.classes if name not in present],
        "num_pixels": total,
        "seed": config.seed,
    }


def _text(result: dict[str, Any]) -> str:
    """Format the result as the table that is printed."""
    lines = [f"{result['model']}: mIoU {result['miou']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} %", ""]
    lines += [f"{name:30}{iou:7.2f} %" for name, iou in sorted(result["iou"].items(), key=lambda item: item[1])]
    if result["absent_classes"]:
        lines.append(
            f"note: left out of the mean, since no validation mask has them: {', '.join(result['absent_classes'])}"
        )
    if result["num_undecodable"]:
        lines.append(
            f"note: {result['num_undecodable']} pairs could not be decoded and are left out; result.json names them"
        )
    return "\n".join([*lines, "", f"picture: {result['out']}/segments.png"])
