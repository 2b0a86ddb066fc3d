"""The model file that MLflow packages: images become embeddings, or labels where a head was trained; nothing is masked.

MLflow runs this file by itself, beside a copy of mae_core, on machines that have neither Ray nor this package.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd

_CROP_SHARE = 224 / 256
"""Evaluation's centre crop: this share of the shorter side (section 4's evaluation on ImageNet)."""
_BATCH = 64


@dataclass(frozen=True)
class Input:
    """What the network takes."""

    image_px: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]


class Embedder(mlflow.pyfunc.PythonModel):
    """Encoded images (bytes of JPEG, PNG or WebP) become one row each.

    A backbone gives columns 0, 1, ... with the mean of the patch tokens; a classifier gives `label`, `score`.
    """

    def load_context(self, context: Any) -> None:
        """The network is in memory, read from safetensors."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        config = json.loads(files["config.json"].read_text())
        shape = config if config["kind"] == "classifier" else config["model"]
        pixels = config["pixels"]
        self.input = Input(tuple(shape["image_px"]), shape["channels"], pixels["mean"], pixels["std"])
        self.classes = config.get("classes")
        self.network = _classifier(config, files) if self.classes else _encoder(config, files)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each image in the first column. Raises ValueError that says which image cannot be read."""
        table = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(list(model_input))
        encoded = list(table.iloc[:, 0])
        outputs = [self._run(encoded, start) for start in range(0, len(encoded), _BATCH)]
        rows = np.concatenate(outputs) if outputs else np.zeros((0, 0), np.float32)
        if not self.classes:
            return pd.DataFrame(rows)
        best = rows.argmax(1) if len(rows) else np.zeros(0, int)
        return pd.DataFrame({"label": [self.classes[i] for i in best], "score": rows[np.arange(len(best)), best]})

    def _run(self, encoded: list[bytes], start: int) -> np.ndarray:
        import torch

        views = [
            view(bytes(content), self.input, start + i) for i, content in enumerate(encoded[start : start + _BATCH])
        ]
        with torch.inference_mode():
            return self.network(torch.from_numpy(np.stack(views))).numpy()


def view(content: bytes, wanted: Input, index: int) -> np.ndarray:
    """The image as evaluation sees it: upright, its centre, resized, normalised; float32 [c h w]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if wanted.channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {index} cannot be read ({error}); send the bytes of a JPEG, PNG or WebP") from None
    height_px, width_px = wanted.image_px
    if image.size != (width_px, height_px):
        scale = min(image.height / height_px, image.width / width_px)
        share = _CROP_SHARE if scale > 1 else 1.0
        crop_h, crop_w = height_px * scale * share, width_px * scale * share
        left, top = (image.width - crop_w) / 2, (image.height - crop_h) / 2
        box = (left, top, left + crop_w, top + crop_h)
        image = image.resize((width_px, height_px), Image.Resampling.BICUBIC, box=box)
    array = np.asarray(image, np.float32).reshape(height_px, width_px, wanted.channels) / 255
    return ((array - np.asarray(wanted.mean, np.float32)) / np.asarray(wanted.std, np.float32)).transpose(2, 0, 1)


def _encoder(config: dict[str, Any], files: dict[str, Path]) -> Any:
    """Images [b c h w] -> mean of the patch tokens [b d]."""
    from safetensors.torch import load_file

    from mae_core.config import parse_arch
    from mae_core.encoder import build_encoder, encode

    model = config["model"]
    vit = build_encoder(parse_arch(model["arch"]), tuple(model["image_px"]), model["channels"])
    vit.load_state_dict(load_file(files["encoder.safetensors"]))
    vit.eval()
    return lambda images: encode(vit, images, None)[:, 1:].mean(1)


def _classifier(config: dict[str, Any], files: dict[str, Path]) -> Any:
    """Images [b c h w] -> probability of each class [b k]."""
    from mae_core.classifier import build_classifier
    from safetensors.torch import load_file

    from mae_core.config import ClassifierConfig, parse_arch

    settings = ClassifierConfig(**config["classifier"])
    shape = (parse_arch(config["arch"]), tuple(config["image_px"]), config["channels"], len(config["classes"]))
    network = build_classifier(*shape, settings)
    network.load_state_dict(load_file(files["classifier.safetensors"]))
    network.eval()
    return lambda images: network(images).softmax(1)


mlflow.models.set_model(Embedder())
