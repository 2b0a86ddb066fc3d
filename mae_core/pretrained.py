"""Load what a run exports or the registry holds, and use it: embed images, classify them, draw reconstructions.

An export is a folder with `config.json` and safetensors files; nothing in it is ever unpickled. Images go in as uint8
arrays, channels last, already resized to the model's input.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.augment import pixels_to_input
from mae_core.classifier import build_classifier, features
from mae_core.config import LAYER_NORM_EPS, ClassifierConfig, MaskConfig, ModelConfig, Size, parse_arch
from mae_core.encoder import build_encoder, encode, encode_layers
from mae_core.errors import UserError
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.normalization import Normalization, Reading, ValueRange

Images: TypeAlias = UInt8[Tensor, "batch height width channels"] | Float32[Tensor, "batch height width channels"]
"""uint8 for a model of 8-bit images; otherwise from 0 to 1, by its `normalization.values` (`mae_core.values`)."""


class Encoder(nn.Module):
    """A pretrained encoder with the normalization of its training images."""

    def __init__(self, vit: VisionTransformer, config: ModelConfig, normalization: Normalization) -> None:
        super().__init__()
        self.vit, self.config, self.normalization = vit, config, normalization

    @property
    def image_px(self) -> Size:
        """Height and width of the input."""
        return self.config.image_px

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.config.channels

    def forward(self, images: Images, pool: Literal["avg", "token"] = "avg") -> Float[Tensor, "batch features"]:
        """Embed images: the mean of the patch tokens, or the class token.

        Raises UserError if the images do not have the model's size and channels.
        """
        return features(self.vit, _inputs(self, images), pool)

    def tokens(self, images: Images) -> Float[Tensor, "batch tokens features"]:
        """Encode every patch: the class token first, then the patch tokens row by row.

        Raises UserError if the images do not have the model's size and channels.
        """
        return encode(self.vit, _inputs(self, images), None)

    def layers(self, images: Images, num_layers: int) -> list[Float[Tensor, "batch tokens features"]]:
        """Return what `tokens` returns, for each of the last `num_layers` blocks, the last block last.

        Raises UserError if the images do not have the model's size and channels.
        """
        return encode_layers(self.vit, _inputs(self, images), num_layers)


class Classifier(nn.Module):
    """A fine-tuned classifier with its class names and the normalization of its training images."""

    def __init__(
        self,
        vit: VisionTransformer,
        classes: tuple[str, ...],
        image_px: Size,
        normalization: Normalization,
        *,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.vit, self.classes, self.image_px, self.normalization = vit, classes, image_px, normalization
        self.multi_label = multi_label

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.vit.patch_embed.proj.in_channels

    def forward(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Return the probability of each class, in the order of `classes`. With `multi_label` they do not sum to 1.

        Raises UserError if the images do not have the model's size and channels.
        """
        logits = self.vit(_inputs(self, images))
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def load_encoder(folder: str | Path) -> Encoder:
    """Load the encoder of an exported backbone, ready for inference on the CPU.

    The folder holds `config.json` and `encoder.safetensors`. Raises UserError if it holds something else.
    """
    config = _config(folder, "backbone")
    return encoder_of(config, _tensors(folder, "encoder.safetensors"))


def load_mae(folder: str | Path) -> tuple[MaskedAutoencoder, Normalization]:
    """Load an exported backbone with its decoder, ready for `MaskedAutoencoder.reconstruct` on the CPU.

    The folder holds `config.json` and `mae.safetensors`. Raises UserError if it holds something else.
    """
    config = _config(folder, "backbone")
    return mae_of(config, _tensors(folder, "mae.safetensors"))


def load_classifier(folder: str | Path) -> Classifier:
    """Load an exported classifier, ready for inference on the CPU.

    The folder holds `config.json` and `classifier.safetensors`. Raises UserError if it holds something else.
    """
    config = _config(folder, "classifier")
    return classifier_of(config, _tensors(folder, "classifier.safetensors"))


def encoder_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoder:
    """Build an encoder from the values of its config.json and its weights under timm's names."""
    model = _model_config(config["model"])
    vit = build_encoder(parse_arch(model.arch), model.image_px, model.channels, norm_eps=model.norm_eps)
    vit.load_state_dict(dict(tensors))
    return Encoder(vit, model, _normalization(config)).eval()


def mae_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[MaskedAutoencoder, Normalization]:
    """Build an encoder with its decoder from the values of its config.json and its weights."""
    mae = build_mae(_model_config(config["model"]), seed=0)
    mae.load_state_dict(dict(tensors))
    return mae.eval(), _normalization(config)


def classifier_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Classifier:
    """Build a classifier from the values of its config.json and its weights under timm's names."""
    classes, image_px = tuple(config["classes"]), _size(config["image_px"])
    vit = build_classifier(
        parse_arch(config["arch"]),
        image_px,
        config["channels"],
        len(classes),
        ClassifierConfig(**config["classifier"]),
        config.get("norm_eps", LAYER_NORM_EPS),
    )
    vit.load_state_dict(dict(tensors))
    multi_label = bool(config.get("multi_label", False))
    return Classifier(vit, classes, image_px, _normalization(config), multi_label=multi_label).eval()


def _inputs(model: Encoder | Classifier, images: Images) -> Float[Tensor, "batch channels height width"]:
    """Normalize images for the model. Raises UserError if their size or channels are not the model's."""
    (height_px, width_px), channels = model.image_px, model.channels
    if (images.dtype == torch.uint8) != (model.normalization.values is None):
        wanted = "uint8" if model.normalization.values is None else "float32 from 0 to 1, by normalization.values"
        raise UserError(f"images are {str(images.dtype).removeprefix('torch.')}, but the model takes {wanted}")
    if images.shape[1:] != (height_px, width_px, channels):
        raise UserError(
            f"images are {' x '.join(map(str, images.shape[1:]))} (height, width, channels), but the model takes "
            f"{height_px} x {width_px} x {channels}; resize or convert them"
        )
    return pixels_to_input(images, model.normalization)


def _config(folder: str | Path, kind: str) -> dict[str, Any]:
    path = _file(folder, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise UserError(f"{folder} holds a model of kind {found!r}, not a {kind}; give the folder of a {kind}")
    return config


def _file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}; give the export/ folder of a finished run, or download a version")
    return path


def _tensors(folder: str | Path, name: str) -> dict[str, Tensor]:
    path = _file(folder, name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); copy or download it again") from error


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    try:
        mask = MaskConfig(**values.get("mask", {}))
        return ModelConfig(**{**values, "image_px": _size(values["image_px"]), "mask": mask})
    except TypeError as error:
        raise UserError(
            f"config.json has a model option that this mae_core does not know ({error}); use the version that wrote it"
        ) from error


def _normalization(config: Mapping[str, Any]) -> Normalization:
    pixels = config["pixels"]
    return Normalization(
        mean=tuple(pixels["mean"]), std=tuple(pixels["std"]), values=value_range_of(pixels.get("values"))
    )


def value_range_of(values: Mapping[str, Any] | None) -> ValueRange | None:
    """Build a value range from what JSON holds of it. Raises UserError for options of a later version."""
    if values is None:
        return None
    try:
        lists = {name: tuple(values[name]) for name in ("low", "high")}
        percentiles = tuple(values["percentiles"]) if values.get("percentiles") else None
        reading = Reading(**values.get("reading", {}))
        return ValueRange(**{**values, **lists, "percentiles": percentiles, "reading": reading})
    except (TypeError, KeyError) as error:
        raise UserError(
            f"config.json has a value range that this mae_core does not know ({error}); use the version that wrote it"
        ) from error


def _size(values: Any) -> Size:
    height, width = values
    return height, width
