"""`mae curate`: rank images by how well a model reconstructs them, and list both ends to be left out.

After Pixio (Yang et al. 2025): images with the lowest loss are blank or trivial, and those with the highest noise.
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import input_to_pixels, pixels_to_input
from mae_core.config import ModelConfig, Size
from mae_core.masking import sample_masks
from mae_core.model import MaskedAutoencoder
from mae_core.normalization import Normalization, ValueRange
from mae_core.pretrained import mae_of
from mae_core.state import unpack
from pipelines.config import CurateConfig
from pipelines.embedding.embed import automatic_batch
from pipelines.embedding.inputs import Record, records_of
from pipelines.embedding.lists import write_list
from pipelines.embedding.parts import Forward
from pipelines.embedding.run import Job, Results, compute
from pipelines.images.decode import ImageArray, input_view
from pipelines.pictures.figures import shown_pixels
from pipelines.pictures.loss_figures import Reconstructed, loss_figure
from pipelines.prepare.workfolder import Purpose
from pipelines.registry import ModelFiles, read_model
from pipelines.storage import Storage, open_storage

PURPOSE = Purpose(".curate", "losses", "curation")
MANIFEST = "losses.json"
RANKED = "ranked.parquet"
_WEIGHTS = "mae.safetensors"
_REMEDY = "give a backbone with its decoder, such as models:/mae-<arch>"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Reconstruction loss of each image, the mean over several masks."""

    config_json: str
    image_px: Size
    channels: int
    values: ValueRange | None
    masks: int
    seed: int

    def load(self, weights: bytes, device: torch.device) -> Forward:
        mae, normalization = mae_of(json.loads(self.config_json), unpack(weights))
        return partial(self._values, mae.to(device), normalization)

    def column(self, name: str, values: NDArray[Any]) -> pa.Array:
        return pa.array(values, pa.float32())

    @property
    def metadata(self) -> dict[str, str]:
        return {"masks": str(self.masks), "seed": str(self.seed)}

    def _values(
        self, mae: MaskedAutoencoder, normalization: Normalization, images: Tensor, ids: Tensor
    ) -> dict[str, Tensor]:
        inputs, config = pixels_to_input(images, normalization), mae.config
        total = torch.zeros(len(images), device=images.device)
        for number in range(self.masks):
            mask = sample_masks(config.mask, config.grid, seed=self.seed, epoch=0, sample_ids=ids, view=number)
            total += mae(inputs, mask)
        return {"loss": total / self.masks}


def curate(source: str, out: str, config: CurateConfig) -> dict[str, Any]:
    """Rank every image of a prepared dataset or source by its loss; write the ranking, two lists and two pictures.

    The same command resumes after a kill. Lists hold training images only: what a model is measured on stays as it is.
    Raises UserError, before anything is written, if the model or the source is none.
    """
    model = read_model(config.model, _WEIGHTS, remedy=_REMEDY)
    mae, normalization = mae_of(model.values, model.tensors)
    options = {"masks": config.masks, "seed": config.seed, "gpu": config.gpu}
    job = Job(
        purpose=PURPOSE,
        kind="curate",
        manifest=MANIFEST,
        measure=_measure(model, mae.config, normalization, config),
        model=model,
        options=options | {"rows_per_part": config.rows_per_part, "max_pixels": config.max_pixels},
        batch=config.batch or _automatic_batch(mae, gpu=config.gpu),
    )
    results = compute(job, source, out, config)
    # Computed from the losses each time, so that other shares need no new losses.
    target = open_storage(out)
    table = _ranked(target, results)
    lowest, highest = _ends(table, config)
    lists = {"lowest.txt": lowest, "highest.txt": highest}
    counts = {name: write_list(target, name, names) for name, names in lists.items()}
    for end, rows in (("lowest", table.slice(0, config.num_images)), ("highest", _last(table, config.num_images))):
        target.write(f"{end}.png", _picture(end, mae, normalization, source, results, rows, config))
    losses = table["loss"].to_numpy()
    return {
        "uri": out,
        **results.summary,
        "mean_loss": float(losses.mean()),
        "lowest": {"file": target.join("lowest.txt"), "num_images": counts["lowest.txt"]},
        "highest": {"file": target.join("highest.txt"), "num_images": counts["highest.txt"]},
        "ranked": target.join(RANKED),
        "pictures": [target.join("lowest.png"), target.join("highest.png")],
    }


def _measure(model: ModelFiles, model_config: ModelConfig, normalization: Normalization, config: CurateConfig) -> Loss:
    return Loss(
        config_json=model.config.decode(),
        image_px=model_config.image_px,
        channels=model_config.channels,
        values=normalization.values,
        masks=config.masks,
        seed=config.seed,
    )


def _automatic_batch(mae: MaskedAutoencoder, *, gpu: bool) -> int:
    """Return the batch for the encoder on visible patches or the decoder on all, whichever is larger."""
    config, width = mae.config, mae.encoder.embed_dim
    share = config.num_visible * width / (config.num_patches * config.decoder_width)
    return automatic_batch(config.num_patches + 1, max(1, round(config.decoder_width * max(1.0, share))), gpu=gpu)


def _ranked(target: Storage, results: Results) -> pa.Table:
    """Write and return id, source, split, label and loss of every image, the lowest loss first."""
    parts = [pq.read_table(pa.BufferReader(target.read(found.path))) for found in results.tables]
    table = pa.concat_tables(parts)
    table = table.sort_by([("loss", "ascending"), ("id", "ascending")])
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression="ZSTD")
    target.write(RANKED, file.getvalue().to_pybytes())
    return table


def _ends(table: pa.Table, config: CurateConfig) -> tuple[list[str], list[str]]:
    """Return the names of the training images with the lowest and the highest losses."""
    names = table.filter(pc.field("split") == "train")["source"].to_pylist()
    low, high = (int(share * len(names)) for share in (config.drop_lowest, config.drop_highest))
    return names[:low], names[len(names) - high :]


def _last(table: pa.Table, count: int) -> pa.Table:
    """Return the last rows, the last one first."""
    rows = np.arange(len(table))[::-1][:count]
    return table.take(pa.array(rows))


def _picture(
    end: str,
    mae: MaskedAutoencoder,
    normalization: Normalization,
    source: str,
    results: Results,
    rows: pa.Table,
    config: CurateConfig,
) -> bytes:
    """Draw these images, each masked and reconstructed with the first of its masks."""
    records = {record.id: record for record in records_of(source, rows["id"].to_pylist(), results.identity["input"])}
    shown = []
    for row in rows.to_pylist():
        pixels = _pixels(records[row["id"]], mae.config, normalization.values)
        triple = shown_pixels(pixels), *_reconstructed(mae, normalization, pixels, row["id"], config.seed)
        shown.append(Reconstructed(row["source"], row["label"], row["loss"], triple))
    return loss_figure(f"{end.capitalize()} reconstruction loss among {results.num_rows:,} images", shown)


@torch.inference_mode()
def _reconstructed(
    mae: MaskedAutoencoder, normalization: Normalization, pixels: NDArray[Any], number: int, seed: int
) -> tuple[ImageArray, ImageArray]:
    """Return the image masked and reconstructed."""
    config = mae.config
    mask = sample_masks(config.mask, config.grid, seed=seed, epoch=0, sample_ids=torch.tensor([number]))
    pair = mae.reconstruct(pixels_to_input(torch.from_numpy(pixels[None]), normalization), mask)
    masked, restored = (shown_pixels(input_to_pixels(inputs, normalization)[0].numpy()) for inputs in pair)
    return masked, restored


def _pixels(record: Record, config: ModelConfig, values: ValueRange | None) -> NDArray[Any]:
    assert isinstance(record.content, bytes), "an image that was read before"
    # A copy, since Pillow's arrays are read-only and torch refuses them.
    return np.array(input_view(record.content, config.channels, config.image_px, values, record.orientation))
