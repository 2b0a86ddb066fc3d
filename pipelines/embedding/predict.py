"""`mae predict`: a classifier's class and probabilities for every image of a bucket, in Parquet."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.pretrained import Classifier, classifier_of
from pipelines.config import PredictConfig
from pipelines.embedding.embed import automatic_batch
from pipelines.embedding.parts import Forward
from pipelines.embedding.run import Job, compute
from pipelines.prepare.workfolder import Purpose
from pipelines.registry import read_model
from pipelines.storage import open_storage

PURPOSE = Purpose(".predict", "predictions", "prediction")
MANIFEST = "predictions.json"
_WEIGHTS = "classifier.safetensors"
_REMEDY = "give a classifier such as models:/mae-<arch>-classifier, which `mae finetune` registers"
_MULTI_LABEL_ABOVE = 0.5
"""Probability from which a class is predicted where an image may have several, as in the served model."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted class, its probability and the probabilities of all classes; or, of several, all likely ones."""

    config_json: str
    image_px: Size
    channels: int
    values: ValueRange | None
    classes: tuple[str, ...]
    multi_label: bool

    def load(self, weights: bytes, device: torch.device) -> Forward:
        classifier = classifier_of(json.loads(self.config_json), load(weights)).to(device)
        return lambda images, ids: self._values(classifier, images)

    def column(self, name: str, values: NDArray[Any]) -> pa.Array:
        if name == "probabilities":
            flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
            return pa.FixedSizeListArray.from_arrays(flat, len(self.classes))
        if name == "score":
            return pa.array(values, pa.float32())
        if self.multi_label:
            found = [[self.classes[i] for i in np.flatnonzero(row)] for row in values]
            return pa.array(found, pa.list_(pa.string()))
        return pa.array([self.classes[i] for i in values], pa.string())

    @property
    def metadata(self) -> dict[str, str]:
        return {"classes": json.dumps(self.classes), "multi_label": json.dumps(self.multi_label)}

    def _values(self, classifier: Classifier, images: Tensor) -> dict[str, Tensor]:
        probabilities = classifier(images).float()
        if self.multi_label:
            return {"predicted": probabilities >= _MULTI_LABEL_ABOVE, "probabilities": probabilities}
        score, predicted = probabilities.max(dim=1)
        return {"predicted": predicted, "score": score, "probabilities": probabilities}


def predict(model: str, source: str, out: str, config: PredictConfig) -> dict[str, Any]:
    """Classify every image of a prepared dataset or source; return counts and digests.

    num_found = num_rows + num_quarantined. The same command resumes after a kill, and returns existing predictions of
    the same images, model and options. Raises UserError, before anything is written, if model or source is none.
    """
    files = read_model(model, _WEIGHTS, remedy=_REMEDY)
    if not files.values.get("classes"):
        raise UserError(f"{files.shown} names no classes; {_REMEDY}")
    classifier = classifier_of(files.values, files.tensors)
    measure = Prediction(
        config_json=files.config.decode(),
        image_px=classifier.image_px,
        channels=classifier.channels,
        values=classifier.normalization.values,
        classes=classifier.classes,
        multi_label=classifier.multi_label,
    )
    vit = classifier.vit
    job = Job(
        purpose=PURPOSE,
        kind="predict",
        manifest=MANIFEST,
        measure=measure,
        model=files,
        options={name: getattr(config, name) for name in ("gpu", "rows_per_part", "max_pixels")},
        batch=config.batch or automatic_batch(vit.patch_embed.num_patches + 1, vit.embed_dim, gpu=config.gpu),
    )
    results = compute(job, source, out, config)
    return {"uri": open_storage(out).uri, **results.summary, "classes": list(classifier.classes)}
