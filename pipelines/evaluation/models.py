"""Open the model that a command names: a version in the registry, or an exported folder."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mae_core.classifier import load_encoder_weights
from mae_core.config import Size, parse_arch
from mae_core.encoder import build_encoder
from mae_core.errors import UserError
from mae_core.pretrained import Encoder, load_encoder
from pipelines import registry


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a model's files, the version that they are of, if any, and their digest."""

    folder: Path
    ref: registry.ModelRef | None
    digest: str

    @property
    def shown(self) -> str:
        """URI of the version, or the folder's path."""
        return self.ref.uri if self.ref else str(self.folder.absolute())


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder, ready on its device, and where it came from."""

    encoder: Encoder
    ref: registry.ModelRef | None
    digest: str
    shown: str


def is_registered(model: str) -> bool:
    """Return whether the model is named as a version of the registry, not as a folder."""
    return model.startswith("models:/")


def needed_tracking(model: str, experiment: str, *, log: bool) -> registry.Tracking | None:
    """Open MLflow if the model is in its registry or the result is to be logged."""
    return registry.open_tracking(experiment) if log or is_registered(model) else None


@contextmanager
def model_files(model: str, tracking: registry.Tracking | None, weights: str, remedy: str) -> Iterator[ModelFiles]:
    """Fetch config.json and the weights, unless they are in a folder already.

    Raises UserError that ends with the remedy if the version has no such weights.
    """
    names = ("config.json", weights)
    if not is_registered(model):
        folder = Path(model)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for name in names if (path := folder / name).is_file()]
        yield ModelFiles(folder, None, digest_of(digests))
        return
    assert tracking is not None
    ref = tracking.resolve(model)
    if weights not in ref.sha256:
        raise UserError(f"{ref.uri} has no {weights}; {remedy.format(model=ref.uri)}")
    with TemporaryDirectory(prefix="mae-model-") as scratch:
        tracking.fetch(ref, Path(scratch))
        yield ModelFiles(Path(scratch), ref, digest_of([ref.sha256[name] for name in names]))


def open_encoder(
    model: str, tracking: registry.Tracking | None, image_px: Size | None, device: torch.device
) -> OpenedEncoder:
    """Open a backbone's encoder; for another image size its position table is resized.

    Raises UserError if the model is no backbone, or if its patch does not divide the image.
    """
    with model_files(model, tracking, "encoder.safetensors", "give a backbone such as models:/mae-<arch>") as files:
        encoder = load_encoder(files.folder)
    if image_px is not None and image_px != encoder.image_px:
        config = dataclasses.replace(encoder.config, image_px=image_px)
        vit = build_encoder(parse_arch(config.arch), image_px, config.channels, norm_eps=config.norm_eps)
        load_encoder_weights(vit, encoder.vit.state_dict(), encoder.image_px)
        encoder = Encoder(vit, config, encoder.normalization)
    return OpenedEncoder(encoder.eval().requires_grad_(False).to(device), files.ref, files.digest, files.shown)


def device_of(*, gpu: bool) -> torch.device:
    """Return the device to compute on. Raises UserError if there is no GPU."""
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu was given but torch finds no GPU; leave it out, or check `mae doctor`")
    return torch.device("cuda" if gpu else "cpu")


def digest_of(parts: list[str]) -> str:
    """Hash texts to one sha256 in hex."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
