"""Model code that MLflow packages: embed images, or predict labels if the model has a trained head. Nothing is masked.

MLflow runs this file alone, on machines that have neither Ray nor this package. It is packaged with copies of mae_core
and of pipelines/images/decode (as mae_decode), so that preprocessing equals that of evaluation.
"""

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

_BATCH = 64
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")
_MOST_SHOWN_BYTES = 80


class WrongImage(MlflowException, ValueError):
    """An image that cannot be read. A server answers it with status 400 and this sentence."""

    def __init__(self, said: str) -> None:
        self._said = said
        super().__init__(said, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The sentence alone: MLflow's server would put the whole request in front of it."""
        return self._said

    @message.setter
    def message(self, said: str) -> None:
        pass


class Embedder(mlflow.pyfunc.PythonModel):
    """Map encoded images (bytes of JPEG, PNG, WebP, ...) to one table row each.

    A backbone returns columns 0, 1, ... with the mean of the patch tokens; a classifier returns `label` and `score`.
    One with several classes an image returns `labels`, those of probability 0.5 or more, and a column for each class.
    """

    def load_context(self, context: Any) -> None:
        """Load the network from safetensors and JSON. Raises ValueError that names a file that was altered."""
        from safetensors.torch import load_file

        from mae_core.pretrained import classifier_of, encoder_of

        files = {name: Path(path) for name, path in context.artifacts.items()}
        _verify(files, context.model_config or {})
        config = json.loads(files["config.json"].read_text())
        self.classes: list[str] | None = config.get("classes")
        self.network: Any = (
            classifier_of(config, load_file(files["classifier.safetensors"]))
            if self.classes
            else encoder_of(config, load_file(files["encoder.safetensors"]))
        )

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return one row per image of the first column. Raises WrongImage that names the one that cannot be read."""
        import numpy as np
        import torch

        encoded = [_bytes_of(content, i) for i, content in enumerate(model_input.iloc[:, 0])]
        rows = [np.zeros((0, 0), np.float32)] if not encoded else []
        with torch.inference_mode():
            for start in range(0, len(encoded), _BATCH):
                rows.append(self.network(self._read(encoded, start)).float().numpy())
        outputs = np.concatenate(rows)
        if not self.classes:
            return pd.DataFrame(outputs)
        if self.network.multi_label:
            labels = [[c for c, p in zip(self.classes, row) if p >= 0.5] for row in outputs]
            return pd.DataFrame({"labels": labels, **{c: outputs[:, i] for i, c in enumerate(self.classes)}})
        best = outputs.argmax(1) if len(outputs) else []
        return pd.DataFrame({"label": [self.classes[i] for i in best], "score": [r[i] for r, i in zip(outputs, best)]})

    def _read(self, encoded: list[bytes], start: int) -> Any:
        """Decode and crop one batch of images, starting at index `start`, to the network's input."""
        import numpy as np
        import torch
        from mae_decode import input_view  # pyright: ignore[reportMissingImports]

        network, views = self.network, []
        for i, content in enumerate(encoded[start : start + _BATCH], start):
            try:
                values = network.normalization.values
                views.append(input_view(content, network.channels, network.image_px, values))
            except ValueError as error:
                raise WrongImage(
                    f"image {i} cannot be read ({error}); send a complete image file, as those the model was trained on"
                ) from None
        return torch.from_numpy(np.stack(views))


def _verify(files: dict[str, Path], packaged: dict[str, Any]) -> None:
    """Compare the files with the sha256 that they were packaged with; earlier versions were packaged without."""
    for name, expected in packaged.get("sha256", {}).items():
        with files[name].open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{name} of {packaged['model']} has sha256 {found[:12]}... instead of the packaged {expected[:12]}...: "
                "it was changed or damaged after registration; register the run again with `mae register`"
            )


def _bytes_of(content: Any, i: int) -> bytes:
    """Return the encoded image. Raises WrongImage if it is something else, such as the path of a file.

    MLflow's server decodes base64 in tables, but not in `inputs` and `instances`. No image file is base64 from its
    first byte to its last.
    """
    if isinstance(content, bytes | bytearray | memoryview):
        found = bytes(content)
        if _BASE64.fullmatch(found):
            try:
                return base64.b64decode(found)
            except binascii.Error:
                pass
        if len(found) > _MOST_SHOWN_BYTES or not found.isascii() or not found.decode().isprintable():
            return found
        content = found.decode()
    what = f"the text {content[:80]!r}" if isinstance(content, str) else f"of type {type(content).__name__}"
    raise WrongImage(
        f"image {i} is {what}, but the model takes the bytes of an image file; send Path(file).read_bytes(), or its "
        "base64 in a request to a server"
    )


mlflow.models.set_model(Embedder())
