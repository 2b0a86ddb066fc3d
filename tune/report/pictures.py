"""Reconstructions of the same images by every point of a sweep, side by side."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mae_core.config import MaskConfig, num_visible
from mae_core.pretrained import mae_of
from pipelines.images.decode import ImageArray
from pipelines.pictures.figures import shown_size
from pipelines.pictures.reconstruct import reconstruct, split_images
from pipelines.registry import read_model
from tune.report.page import RATIOS, Row
from tune.trial import Trial

_NUM_IMAGES = 5
_SIDE_PX = 112
_REMEDY = "a picture needs the export of a finished pretraining"


def reconstruction_rows(trials: Sequence[Trial], titles: Sequence[str]) -> dict[float, list[Row]]:
    """Return, for each mask ratio, rows of the same val images: original, masked, and one reconstruction per trial.

    All trials get the same random masks, whatever they were trained with. Trials whose input differs from the first
    one's are left out, as are ratios that leave no patch of a model visible.
    """
    found: dict[float, list[Row]] = {ratio: [] for ratio in RATIOS}
    images: NDArray[Any] | None = None
    for trial, title in zip(trials, titles, strict=True):
        assert trial.pretrain is not None
        config = trial.pretrain.config
        files = read_model(f"{trial.pretrain.folder}/export", "mae.safetensors", remedy=_REMEDY)
        mae, normalization = mae_of(files.values, files.tensors)
        if images is None:
            images = split_images(
                config.data.uri,
                trial.manifest.split("val"),
                _NUM_IMAGES,
                mae.config.image_px,
                mae.config.channels,
                normalization.values,
            )
        elif images.shape[1:] != (*mae.config.image_px, mae.config.channels):
            continue
        for ratio in RATIOS:
            if not num_visible(mae.config.num_patches, ratio):
                continue
            with torch.inference_mode():
                triples = reconstruct(mae, normalization, images, MaskConfig(ratio=ratio), config.seed)
            masked, restored, originals = zip(*triples)
            if not found[ratio]:
                found[ratio] = [
                    Row(key="", title="original", pictures=_uris(originals)),
                    Row(key="", title="masked", pictures=_uris(masked)),
                ]
            found[ratio].append(Row(key=trial.key, title=title, pictures=_uris(restored)))
    longest = max(map(len, found.values()))
    return {ratio: rows if len(rows) == longest else [] for ratio, rows in found.items()}


def _uris(pictures: Sequence[ImageArray]) -> tuple[str, ...]:
    return tuple(map(_uri, pictures))


def _uri(picture: ImageArray) -> str:
    """Encode an image without loss if it is small, which the page enlarges, and as a smaller WebP if it is large."""
    pixels = picture[:, :, 0] if picture.shape[2] == 1 else picture
    image, file = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if max(image.size) > _SIDE_PX:
        height_px, width_px = shown_size(picture)
        scale = min(1.0, _SIDE_PX * 2 / max(height_px, width_px))
        image = image.resize((round(width_px * scale), round(height_px * scale)), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
