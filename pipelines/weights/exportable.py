"""What `mae export` writes: the tensors of a version or a folder under our names, and what they need to be used."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_core.config import LAYER_NORM_EPS, ModelConfig
from mae_core.encoder import export_tensors
from mae_core.errors import UserError
from mae_core.formats.ours import Kind
from mae_core.normalization import Normalization
from mae_core.pretrained import load_classifier, load_encoder, load_mae
from mae_core.state import model_tensors
from pipelines.config import ExportConfig, from_dict

_WITH_DECODER = ("transformers", "fair")
"""Formats that have names for a decoder."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model to write in another format."""

    name: str
    """The version's URI or the folder, for messages."""
    kind: Kind
    model: ModelConfig
    """Its decoder's fields mean nothing unless kind is mae."""
    pool: Literal["token", "avg"]
    classes: tuple[str, ...]
    normalization: Normalization
    tensors: dict[str, Tensor]
    """Under our names."""
    vit: VisionTransformer
    """The encoder or classifier, ready for inference."""
    notes: tuple[str, ...] = ()
    """What was left out."""


def load_exportable(folder: Path, name: str, config: ExportConfig) -> Exportable:
    """Load the part that `config` wants from the files of a version or an export.

    Raises UserError if it has no such part, or if the format cannot hold it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name} has no config.json; give models:/NAME@ALIAS, or the export/ folder of a finished run")
    values = json.loads(path.read_bytes())
    if values.get("kind") == "classifier":
        return _classifier(folder, name, config)
    if values.get("kind") != "backbone":
        raise UserError(
            f"{name} is no export of this project (config.json has no kind); register it with `mae import` first"
        )
    if config.part == "classifier":
        raise UserError(
            f"{name} is a backbone, which has no classes; train a classifier from it with `mae finetune`, or export "
            "--part encoder"
        )
    has_decoder = (folder / "mae.safetensors").is_file()
    if config.part == "whole" and has_decoder and config.format in _WITH_DECODER:
        return _mae(folder, name, config.format)
    encoder = load_encoder(folder)
    if encoder.config.class_tokens > 1 and config.format in _WITH_DECODER:
        raise UserError(
            f"{name} has {encoder.config.class_tokens} class tokens, which {config.format} has no names for; try "
            "--format timm"
        )
    return Exportable(
        name=name,
        kind="encoder",
        model=encoder.config,
        pool="token",
        classes=(),
        normalization=encoder.normalization,
        tensors=export_tensors(encoder.vit),
        vit=encoder.vit,
        notes=("The decoder is left out.",) if has_decoder else (),
    )


def _mae(folder: Path, name: str, naming: str) -> Exportable:
    mae, normalization = load_mae(folder)
    _refuse_other_decoders(mae.config, naming)
    return Exportable(
        name=name,
        kind="mae",
        model=mae.config,
        pool="token",
        classes=(),
        normalization=normalization,
        tensors=model_tensors(mae),
        vit=mae.encoder,
    )


def _refuse_other_decoders(model: ModelConfig, naming: str) -> None:
    """Raise UserError if the decoder computes something that the format has no names for."""
    project = "transformers' ViTMAE" if naming == "transformers" else "the reference"
    for value, limit in (
        (model.decoder_attention == "cross" and "decoder_attention cross", "whose decoders have self-attention"),
        (model.mask_token_in == "encoder" and "mask_token_in encoder", "whose mask tokens enter the decoder"),
        (model.class_tokens > 1 and f"{model.class_tokens} class tokens", "with one class token"),
        (model.target == "pca" and "target pca", "that predicts pixels"),
    ):
        if value:
            raise UserError(f"the model has {value}, but {project} is a model {limit}; export --part encoder")


def _classifier(folder: Path, name: str, config: ExportConfig) -> Exportable:
    if config.part == "encoder":
        raise UserError(
            f"{name} is a classifier, whose encoder and head are trained together; export it whole, or export the "
            "backbone that it came from"
        )
    values = json.loads((folder / "config.json").read_bytes())
    height_px, width_px = values["image_px"]
    classifier = load_classifier(folder)
    return Exportable(
        name=name,
        kind="classifier",
        model=ModelConfig(
            arch=values["arch"],
            image_px=(height_px, width_px),
            channels=values["channels"],
            norm_eps=values.get("norm_eps", LAYER_NORM_EPS),
        ),
        pool=values["classifier"]["pool"],
        classes=classifier.classes,
        normalization=from_dict(Normalization, values["pixels"]),
        tensors=model_tensors(classifier.vit),
        vit=classifier.vit,
    )
