"""Build the encoder that a command names, on its device and at the image size asked for."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mae_core.classifier import load_encoder_weights
from mae_core.config import Size, parse_arch
from mae_core.encoder import build_encoder
from mae_core.errors import UserError
from mae_core.pretrained import Encoder, encoder_of
from pipelines import registry


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder, ready on its device, and where it came from."""

    encoder: Encoder
    ref: registry.ModelRef | None
    digest: str
    shown: str


def needed_tracking(model: str, experiment: str, *, log: bool) -> registry.Tracking | None:
    """Open MLflow if the model is in its registry or the result is to be logged."""
    return registry.open_tracking(experiment) if log or registry.is_registered(model) else None


def open_encoder(
    model: str, tracking: registry.Tracking | None, image_px: Size | None, device: torch.device
) -> OpenedEncoder:
    """Open a backbone's encoder; for another image size its position table is resized.

    Raises UserError if the model is no backbone, or if its patch does not divide the image.
    """
    remedy = "give a backbone such as models:/mae-<arch>"
    files = registry.read_model(model, "encoder.safetensors", remedy=remedy, tracking=tracking)
    encoder = encoder_of(files.values, files.tensors)
    if image_px is not None and image_px != encoder.image_px:
        config = dataclasses.replace(encoder.config, image_px=image_px)
        vit = build_encoder(parse_arch(config.arch), image_px, config.channels, norm_eps=config.norm_eps)
        load_encoder_weights(vit, encoder.vit.state_dict(), encoder.image_px)
        encoder = Encoder(vit, config, encoder.normalization)
    return OpenedEncoder(
        encoder.eval().requires_grad_(False).to(device), files.ref, digest_of(files.sha256.values()), files.shown
    )


def device_of(*, gpu: bool) -> torch.device:
    """Return the device to compute on. Raises UserError if there is no GPU."""
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu was given but torch finds no GPU; leave it out, or check `mae doctor`")
    return torch.device("cuda" if gpu else "cpu")


def digest_of(parts: Iterable[str]) -> str:
    """Hash texts to one sha256 in hex."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
