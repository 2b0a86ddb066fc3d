"""`mae embed`: one embedding per image of a dataset, in Parquet."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from mae_core.classifier import pooled
from mae_core.config import Size
from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.pretrained import Encoder, encoder_of
from pipelines.config import EmbedConfig
from pipelines.embedding.parts import Forward
from pipelines.embedding.run import Job, compute
from pipelines.prepare.workfolder import Purpose
from pipelines.registry import read_model

PURPOSE = Purpose(".embed", "embeddings", "embedding")
MANIFEST = "embeddings.json"
_WEIGHTS = "encoder.safetensors"
_REMEDY = "give a backbone such as models:/mae-<arch>"
# Activations of a block per token and feature that are alive at once, in float32: residual, queries, keys, values, MLP.
_FLOATS_PER_VALUE = 10
_BUDGET_BYTES = {"cpu": 64 * 2**20, "gpu": 8 * 2**30}
_LARGEST_BATCH = {"cpu": 128, "gpu": 512}


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Pooled tokens of the last blocks, and all tokens of the last one on request."""

    config_json: str
    image_px: Size
    channels: int
    values: ValueRange | None
    pool: Literal["avg", "token"]
    last_layers: int
    patch_tokens: bool
    stored_as: str

    def load(self, weights: bytes, device: torch.device) -> Forward:
        encoder = encoder_of(json.loads(self.config_json), load(weights)).to(device)
        return lambda images, ids: self._values(encoder, images)

    def column(self, name: str, values: NDArray[Any]) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values.astype(self.stored_as)).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))

    @property
    def metadata(self) -> dict[str, str]:
        return {"pool": self.pool, "last_layers": str(self.last_layers)}

    def _values(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        layers = encoder.layers(images, self.last_layers)
        num = encoder.config.class_tokens
        found = {"embedding": torch.cat([pooled(tokens, num, self.pool) for tokens in layers], dim=1)}
        return found | ({"patch_tokens": layers[-1][:, num:]} if self.patch_tokens else {})


def embed(source: str, out: str, config: EmbedConfig) -> dict[str, Any]:
    """Embed every image of a prepared dataset or source; return counts and digests.

    The same command resumes after a kill, and returns existing embeddings of the same images, model and options. Raises
    UserError, before anything is written, if the model or the source is none.
    """
    model = read_model(config.model, _WEIGHTS, remedy=_REMEDY)
    encoder = encoder_of(model.values, model.tensors)
    depth = len(encoder.vit.blocks)
    if config.last_layers > depth:
        raise UserError(f"last_layers {config.last_layers} is above the encoder's {depth} blocks; try {min(4, depth)}")
    measure = Embedding(
        config_json=model.config.decode(),
        image_px=encoder.image_px,
        channels=encoder.channels,
        values=encoder.normalization.values,
        pool=config.pool,
        last_layers=config.last_layers,
        patch_tokens=config.patch_tokens,
        stored_as=config.stored_as,
    )
    options = {name: getattr(config, name) for name in ("pool", "last_layers", "patch_tokens", "stored_as", "gpu")}
    job = Job(
        purpose=PURPOSE,
        kind="embed",
        manifest=MANIFEST,
        measure=measure,
        model=model,
        options=options | {"rows_per_part": config.rows_per_part, "max_pixels": config.max_pixels},
        batch=config.batch or automatic_batch(encoder.config.num_patches + 1, encoder.vit.embed_dim, gpu=config.gpu),
    )
    results = compute(job, source, out, config)
    return {"uri": out, **results.summary}


def automatic_batch(num_tokens: int, width: int, *, gpu: bool) -> int:
    """Return a power of two: the largest batch whose activations fit a budget, which is of a CPU's cache on CPUs.

    It depends on the model and the kind of device only, so that a resumed run has the same batches on any machine.
    """
    kind = "gpu" if gpu else "cpu"
    fitting = _BUDGET_BYTES[kind] / (num_tokens * width * _FLOATS_PER_VALUE * 4)
    return int(2 ** np.clip(np.floor(np.log2(fitting)), 0, np.log2(_LARGEST_BATCH[kind])))
