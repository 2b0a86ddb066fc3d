"""Read the model that a command names: a version in the registry, or the export/ folder of a run."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mae_core.errors import UserError
from pipelines.registry.tracking import Tracking, open_tracking
from pipelines.registry.versions import ModelRef
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model's config.json and one file of its weights."""

    shown: str
    """URI of the version, without alias, or of the folder."""
    ref: ModelRef | None
    """The version; None for a folder."""
    name: str
    """Name of the file of weights."""
    config: bytes
    weights: bytes

    @property
    def values(self) -> dict[str, Any]:
        """Parse config.json. Raises UserError if it is not an object in JSON."""
        try:
            values = json.loads(self.config)
        except ValueError as error:
            raise UserError(
                f"{CONFIG} of {self.shown} is not JSON ({error}); copy or download the model again"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{CONFIG} of {self.shown} describes no model; copy or download the model again")
        return values

    @property
    def tensors(self) -> dict[str, "Tensor"]:
        """Read the weights by name. Raises UserError if the file is damaged."""
        from mae_core.state import unpack

        return unpack(self.weights)

    @property
    def contents(self) -> dict[str, bytes]:
        """Both files by name."""
        return {CONFIG: self.config, self.name: self.weights}

    @property
    def sha256(self) -> dict[str, str]:
        """Digest of both files by name: the same model in another place is the same model."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.contents.items()}


def is_registered(model: str) -> bool:
    """Return whether the model is named as a version of the registry, not as a folder."""
    return model.startswith("models:/")


def read_model(model: str, *weights: str, remedy: str, tracking: Tracking | None = None) -> ModelFiles:
    """Read config.json, and the first file of `weights` that the model has.

    `model` is models:/NAME@ALIAS, models:/NAME/VERSION, or a folder or s3:// prefix. Raises UserError if there is no
    such model, or if it has no such weights; that error ends with `remedy`, in which "{model}" is replaced.
    """
    if not is_registered(model):
        storage = open_storage(model)
        if not storage.exists(CONFIG):
            raise UserError(
                f"{model} has no {CONFIG}; give models:/NAME@ALIAS, or the export/ folder of a finished run"
            )
        return _of(storage.uri, None, weights, storage.exists, storage.read, remedy)
    tracking = tracking or open_tracking("mae")
    ref = tracking.resolve(model)
    with TemporaryDirectory(prefix="mae-model-") as folder:
        files = tracking.fetch(ref, Path(folder))
        return _of(ref.uri, ref, weights, files.__contains__, lambda name: files[name].read_bytes(), remedy)


def _of(
    shown: str,
    ref: ModelRef | None,
    weights: tuple[str, ...],
    has: Callable[[str], bool],
    read: Callable[[str], bytes],
    remedy: str,
) -> ModelFiles:
    name = next(filter(has, weights), None)
    if name is None:
        raise UserError(f"{shown} has no {' or '.join(weights)}; {remedy.format(model=shown)}")
    return ModelFiles(shown=shown, ref=ref, name=name, config=read(CONFIG), weights=read(name))
