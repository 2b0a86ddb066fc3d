"""Predictions of a classifier on a split, as parts in Parquet: a rerun computes only the parts that are missing.

A row holds `id`, `source`, `label`, `predicted`, `probabilities` (in the order of the classes in the schema's metadata)
and `error`. An image that cannot be decoded has a reason in `error`, and neither prediction nor probabilities.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mae_core.pretrained import Classifier
from pipelines.dataset.manifest import Manifest, Shard
from pipelines.dataset.row_groups import RowGroups
from pipelines.evaluation.metrics import Predictions
from pipelines.images.decode import ImageArray, input_view
from pipelines.storage import Storage

_FOLDER = "predictions"
_ROWS_PER_PART = 1024
_COLUMNS = ["image", "label", "orientation", "source"]


@dataclass(frozen=True)
class _Part:
    """Consecutive row groups of one shard, whose predictions are written together."""

    number: int
    shard: Shard
    groups: range

    @property
    def path(self) -> str:
        return f"{_FOLDER}/part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class _Images:
    """Rows of a part; a view is the reason if its image cannot be decoded."""

    ids: range
    sources: list[str]
    labels: list[str | None]
    views: list[ImageArray | str]


def predict(
    classifier: Classifier,
    uri: str,
    manifest: Manifest,
    split: str,
    out: Storage,
    *,
    batch: int,
    device: torch.device,
) -> Iterator[int]:
    """Write the predictions of every image of the split; yield the number of images of each part once it is there."""
    missing: list[_Part] = []
    for part in _parts(manifest, split):
        if out.exists(part.path):
            yield _num_rows(part)
        else:
            missing.append(part)
    network, row_groups = classifier.to(device), RowGroups(uri)
    with ThreadPoolExecutor(os.cpu_count()) as decoders, ThreadPoolExecutor(1) as ahead:

        def read(part: _Part) -> _Images:
            return _read(part, row_groups, manifest.classes, classifier, decoders)

        # One part is decoded while the network is busy with the part before it.
        reading = ahead.submit(read, missing[0]) if missing else None
        for part, following in itertools.zip_longest(missing, missing[1:]):
            assert reading is not None
            images = reading.result()
            reading = ahead.submit(read, following) if following else None
            _write(out, part.path, images, _probabilities(network, images.views, batch, device), classifier.classes)
            yield len(images.ids)


def read_predictions(out: Storage, classes: Sequence[str]) -> tuple[Predictions, list[tuple[str, str]]]:
    """Read what `predict` wrote: the predictions, and (source, reason) of each image that could not be decoded.

    Images without a label are left out of both.
    """
    parts = [pq.read_table(pa.BufferReader(out.read(path))) for path, _ in out.list(_FOLDER, suffix=".parquet")]
    table = pa.concat_tables(parts)
    table = table.filter(table["label"].is_valid())
    decoded = table["error"].is_null().to_numpy()
    failed, table = table.filter(~decoded), table.filter(decoded)
    index = {name: i for i, name in enumerate(classes)}
    probabilities = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, len(classes))
    found = Predictions(
        ids=table["id"].to_numpy(),
        labels=np.array([index[name] for name in table["label"].to_pylist()], dtype=np.int64),
        probabilities=probabilities,
        classes=tuple(classes),
    )
    return found, list(zip(failed["source"].to_pylist(), failed["error"].to_pylist()))


def _parts(manifest: Manifest, split: str) -> list[_Part]:
    found: list[_Part] = []
    for shard in manifest.split(split).shards:
        step = max(1, _ROWS_PER_PART // shard.rows_per_group)
        for first in range(0, shard.num_groups, step):
            found.append(_Part(len(found), shard, range(first, min(first + step, shard.num_groups))))
    return found


def _num_rows(part: _Part) -> int:
    size = part.shard.rows_per_group
    return min(part.groups.stop * size, part.shard.num_rows) - part.groups.start * size


def _read(
    part: _Part, row_groups: RowGroups, classes: list[str], model: Classifier, decoders: ThreadPoolExecutor
) -> _Images:
    tables = [row_groups.read(part.shard.path, group, _COLUMNS) for group in part.groups]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    first = part.shard.first_id + part.groups.start * part.shard.rows_per_group
    return _Images(
        ids=range(first, first + len(rows)),
        sources=[row["source"] for row in rows],
        labels=[None if row["label"] is None else classes[row["label"]] for row in rows],
        views=list(decoders.map(lambda row: _view(row, model), rows)),
    )


def _view(row: dict[str, Any], model: Classifier) -> ImageArray | str:
    values = model.normalization.values
    try:
        return input_view(row["image"], model.channels, model.image_px, values, row["orientation"])
    except ValueError as error:
        return str(error)


@torch.inference_mode()
def _probabilities(
    network: Classifier, views: Sequence[ImageArray | str], batch: int, device: torch.device
) -> list[Any]:
    """Return each image's probabilities; None for one that could not be decoded."""
    whole = [i for i, view in enumerate(views) if not isinstance(view, str)]
    found: list[Any] = [None] * len(views)
    for start in range(0, len(whole), batch):
        rows = whole[start : start + batch]
        images = torch.from_numpy(np.stack([np.asarray(views[i]) for i in rows])).to(device)
        for i, probabilities in zip(rows, network(images).float().cpu().numpy()):
            found[i] = probabilities
    return found


def _write(out: Storage, path: str, images: _Images, probabilities: list[Any], classes: tuple[str, ...]) -> None:
    predicted = [None if row is None else classes[row.argmax()] for row in probabilities]
    columns = {
        "id": pa.array(images.ids, pa.int64()),
        "source": pa.array(images.sources, pa.string()),
        "label": pa.array(images.labels, pa.string()),
        "predicted": pa.array(predicted, pa.string()),
        # Lists of a fixed size would be apt, but pyarrow 25 cannot read back its own Parquet of them if one is null.
        "probabilities": pa.array(probabilities, pa.list_(pa.float32())),
        "error": pa.array([view if isinstance(view, str) else None for view in images.views], pa.string()),
    }
    file = pa.BufferOutputStream()
    table = pa.table(columns).replace_schema_metadata({"classes": json.dumps(classes)})
    pq.write_table(table, file)
    out.write(path, file.getvalue().to_pybytes())
