"""Files of the model that a command names: a version in the registry, or the export/ folder of a run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mae_core.errors import UserError
from pipelines import registry


@dataclass(frozen=True)
class ModelFiles:
    """A backbone's config.json and weights, with what identifies them."""

    shown: str
    """URI of the version (without alias), or the absolute path of the folder."""
    files: dict[str, bytes]

    @property
    def identity(self) -> dict[str, Any]:
        """Digest of each file: the same model in another place is the same model."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}


def model_files(model: str, weights: str) -> ModelFiles:
    """Read config.json and the weights file of a backbone.

    Raises UserError if there is no such version or folder, or if it has no file of that name.
    """
    names = ("config.json", weights)
    if not model.startswith("models:/"):
        for name in names:
            if not (Path(model) / name).is_file():
                raise UserError(
                    f"model {model} has no {name}; give models:/NAME@ALIAS, or the export/ folder of a pretraining run"
                )
        return ModelFiles(str(Path(model).absolute()), {name: (Path(model) / name).read_bytes() for name in names})
    tracking = registry.open_tracking("mae")
    ref = tracking.resolve(model)
    if weights not in ref.sha256:
        raise UserError(f"{ref.uri} has no {weights}, so it is no backbone with it; try a model such as mae-<arch>")
    with TemporaryDirectory(prefix="mae-model-") as folder:
        found = tracking.fetch(ref, Path(folder))
        return ModelFiles(ref.uri, {name: found[name].read_bytes() for name in names})
