"""`mae look`: what an encoder sees in a folder of images, as pictures.

Colours are the first three principal components of all patch tokens of all images, so that equal colours mean similar
tokens across images. Attention is that of the class token in the last block.
"""

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.attention import encode_with_attention
from mae_core.augment import pixels_to_input
from mae_core.errors import UserError
from mae_core.pretrained import Encoder
from pipelines.config import LookConfig, to_dict
from pipelines.evaluation.models import device_of, needed_tracking, open_encoder
from pipelines.evaluation.outputs import log_run
from pipelines.images.decode import SUFFIXES, ImageArray, input_view
from pipelines.pictures.token_figures import Panel, as_color, heat, panel_sheet
from pipelines.storage import Storage, open_storage

_BATCH = 8
_PERCENTILES = (1, 99)
_MOST_ACROSS = 6


@dataclass(frozen=True)
class _Seen:
    """An image as the encoder takes it, the colours of its patches, and each head's attention to them."""

    name: str
    pixels: ImageArray
    colors: ImageArray
    attention: NDArray[np.floating]


def look(folder: str, out: str, config: LookConfig) -> dict[str, Any]:
    """Draw sheet.png with all images, and one PNG per image with every head; return their names and what was skipped.

    Raises UserError if the folder has no image that can be decoded.
    """
    tracking = needed_tracking(config.model, config.experiment, log=config.log)
    opened = open_encoder(config.model, tracking, config.image_px, device_of(gpu=config.gpu))
    names, views, skipped = _views(open_storage(folder), config.num_images, opened.encoder)
    files = _pictures(_see(opened.encoder, names, views), f"{opened.shown}, {len(names)} images")
    storage = open_storage(out)
    for name, content in files.items():
        storage.write(name, content)
    result: dict[str, Any] = {
        "model": opened.shown,
        "num_images": len(names),
        "num_undecodable": len(skipped),
        "undecodable": skipped,
        "sheet": storage.join("sheet.png"),
        "pictures": sorted(files),
    }
    if config.log and tracking is not None:
        params = to_dict(config) | {"folder": folder}
        result["run_id"] = log_run(tracking, "look", params, [opened.digest, params], opened, files, result)
    return result


def principal_colors(tokens: NDArray[np.floating]) -> ImageArray:
    """Colour tokens [images patches features] by their first three principal components; return uint8.

    The sign of a component is free; here its largest loading is positive, so that equal tokens get equal colours. Each
    component is stretched from its 1st to its 99th percentile.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :3]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[largest, np.arange(3)])
    values = centred @ directions
    low, high = np.percentile(values, _PERCENTILES, axis=0)
    shares = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (255 * shares).round().astype(np.uint8).reshape(*tokens.shape[:2], 3)


def _views(
    storage: Storage, num_images: int, encoder: Encoder
) -> tuple[list[str], list[ImageArray], list[dict[str, str]]]:
    """Return name and evaluation view of images spread over the folder, and those that cannot be decoded."""
    paths = [path for path, _ in storage.list() if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise UserError(f"{storage.uri} has no images; give a folder with {', '.join(SUFFIXES)} files")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(num_images, len(paths))).round().astype(int))
    names, views, skipped = [], [], []
    for path in (paths[i] for i in chosen):
        try:
            values = encoder.normalization.values
            views.append(input_view(storage.read(path), encoder.channels, encoder.image_px, values))
            names.append(path)
        except ValueError as error:
            skipped.append({"image": path, "reason": str(error)})
    if not views:
        raise UserError(
            f"none of the {len(skipped)} images of {storage.uri} can be decoded; check {skipped[0]['image']}"
        )
    return names, views, skipped


@torch.inference_mode()
def _see(encoder: Encoder, names: list[str], views: list[ImageArray]) -> list[_Seen]:
    rows, columns = encoder.config.grid
    device = next(encoder.parameters()).device
    tokens, attention = [], []
    for start in range(0, len(views), _BATCH):
        images = torch.from_numpy(np.stack(views[start : start + _BATCH])).to(device)
        some, weights = encode_with_attention(encoder.vit, pixels_to_input(images, encoder.normalization))
        tokens.append(some[:, encoder.config.class_tokens :].float().cpu().numpy())
        attention.append(weights.float().cpu().numpy())
    colors = principal_colors(np.concatenate(tokens)).reshape(-1, rows, columns, 3)
    maps = np.concatenate(attention)
    maps = maps.reshape(*maps.shape[:2], rows, columns)
    return [_Seen(*seen) for seen in zip(names, map(as_color, views), colors, maps, strict=True)]


def _pictures(seen: list[_Seen], title: str) -> dict[str, bytes]:
    """Return the sheet of all images, and each image's own with all heads, by file name."""
    shared = [
        [
            Panel("image", one.pixels),
            Panel("tokens (PCA)", one.colors),
            Panel("attention, mean of heads", heat(one.attention.mean(0))),
        ]
        for one in seen
    ]
    files = {"sheet.png": panel_sheet([(one.name, panels) for one, panels in zip(seen, shared)], 3)}
    for number, (one, panels) in enumerate(zip(seen, shared)):
        panels = [*panels, *(Panel(f"head {i + 1}", heat(weights)) for i, weights in enumerate(one.attention))]
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in PurePosixPath(one.name).stem)[:60]
        files[f"{number:04d}-{stem}.png"] = panel_sheet([(f"{one.name}  ({title})", panels)], _across(len(panels)))
    return files


def _across(num_panels: int) -> int:
    """Return how many panels stand beside each other, so that rows differ little in length."""
    return math.ceil(num_panels / math.ceil(num_panels / _MOST_ACROSS))
