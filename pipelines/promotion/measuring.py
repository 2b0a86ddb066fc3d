"""Measure versions for a gate: train classifiers on backbones with equal settings, or predict with classifiers.

Per image, the result is the share of seeds with which a version classifies it correctly.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mae_core.bench.flops import embedding_flops
from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import ClassifyConfig, EvaluateConfig, GateConfig, load_preset, run_name
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.drivers.classify import (
    StartingEncoder,
    published_classify_job,
    starting_encoder,
    with_labelled_dataset,
)
from pipelines.drivers.drive import PublishedJob, drive
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.gains import Names
from pipelines.evaluation.metrics import Floats
from pipelines.runs.folder import RunFolder
from pipelines.storage import Storage, open_storage
from pipelines.worker.tally import read_predicted


@dataclass(frozen=True)
class Setting:
    """A dataset, and the share of its training labels that classifiers get."""

    name: str
    """Of its figures in MLflow."""
    uri: str
    labels: str
    manifest: Manifest = dataclasses.field(repr=False)


@dataclass(frozen=True)
class Measured:
    """What one version did in one setting: images by ascending id."""

    ids: np.ndarray
    labels: Names
    shares: Floats
    """Share of seeds with which each image is classified correctly."""


def settings_of(gate: GateConfig, *, is_trained: bool) -> list[Setting]:
    """Open the gate's datasets; return all settings. Raises UserError if there is no dataset, or one is unlabelled."""
    if not gate.data:
        raise UserError("the gate names no dataset; add data to its preset, or try --data prepared/mine")
    found: list[Setting] = []
    for uri in gate.data:
        storage = open_storage(uri)
        manifest = read_manifest(storage)
        if not manifest.has_single_labels:
            raise UserError(f"dataset {uri} has no single label an image, which a gate needs; {manifest.how_to_label}")
        name = storage.uri.rsplit("/", 1)[-1]
        if any(name == setting.name.split("/")[0] and storage.uri != setting.uri for setting in found):
            name = f"{name}-{manifest.digest[:6]}"
        shares = gate.labels if is_trained else ("",)
        found += [Setting(f"{name}/{_plain(labels)}", storage.uri, labels, manifest) for labels in shares]
    return found


def _plain(labels: str) -> str:
    return labels.replace("%", "_percent") or "all"


def flops_of(ref: registry.ModelRef, tracking: registry.Tracking) -> int:
    """Count the operations per image of the version's encoder."""
    weights = "encoder.safetensors" if ref.tags["mae.kind"] == "backbone" else "classifier.safetensors"
    values = registry.read_model(ref.uri, weights, remedy="register it again", tracking=tracking).values
    shape = values.get("model", values)
    height_px, width_px = shape["image_px"]
    return embedding_flops(shape["arch"], (height_px, width_px), shape["channels"])


def measure_backbones(
    refs: Sequence[registry.ModelRef], settings: Sequence[Setting], gate: GateConfig, name: str, output: str,
    tracking: registry.Tracking,
) -> dict[tuple[str, str], Measured]:  # fmt: skip
    """Train a classifier for each version, setting and seed in one worker group; return results by (URI, setting).

    Runs that are in `output` already, such as those of the same champion in an earlier gate, are read and not repeated.
    """
    if not gate.train:
        raise UserError("the gate trains nothing, but the model is a backbone; add train: nano_probe to its preset")
    jobs: dict[tuple[str, str], list[PublishedJob]] = {}
    starts: dict[tuple[str, str], StartingEncoder] = {}
    for setting in settings:
        for ref in refs:
            first, manifest = with_labelled_dataset(_config(gate, setting, gate.seeds[0], ref, output))
            if (ref.uri, setting.uri) not in starts:
                starts[ref.uri, setting.uri] = starting_encoder(first, ref, tracking, manifest)
            jobs[ref.uri, setting.name] = [
                _job(dataclasses.replace(first, seed=seed), starts[ref.uri, setting.uri], manifest, gate)
                for seed in gate.seeds
            ]
    drive([job for group in jobs.values() for job in group], name, tracking, fresh=False)
    return {key: _read(group, gate.split) for key, group in jobs.items()}


def measure_classifiers(
    refs: Sequence[registry.ModelRef], settings: Sequence[Setting], gate: GateConfig, name: str, output: str,
    experiment: str,
) -> dict[tuple[str, str], Measured]:  # fmt: skip
    """Predict with each version in each setting; return results by (URI, setting). Killed, it resumes."""
    found = {}
    for setting in settings:
        for ref in refs:
            folder = open_storage(output).join(f"{name}/{ref.name}-{ref.version}/{setting.name}")
            config = EvaluateConfig(
                model=ref.uri, data=setting.uri, split=gate.split, log=False, num_resamples=0, experiment=experiment
            )
            evaluate(config, folder)
            found[ref.uri, setting.name] = _read_parts(open_storage(folder))
    return found


def _config(gate: GateConfig, setting: Setting, seed: int, ref: registry.ModelRef, output: str) -> ClassifyConfig:
    preset = load_preset(ClassifyConfig, gate.train)
    return dataclasses.replace(
        preset,
        backbone=ref.uri,
        labels=setting.labels,
        seed=seed,
        output=output,
        eval_split=gate.split,
        data=dataclasses.replace(preset.data, uri=setting.uri),
        tracking=dataclasses.replace(preset.tracking, register=False),
    )


def _job(config: ClassifyConfig, start: StartingEncoder, manifest: Manifest, gate: GateConfig) -> PublishedJob:
    return published_classify_job(
        config, run_name(config, f"gate-{Path(gate.train).stem}", manifest.digest), start, manifest
    )


def _read(jobs: Sequence[PublishedJob], split: str) -> Measured:
    """Return the mean over the seeds, each of which has a job."""
    found = [read_predicted(RunFolder(published.job.folder), split) for published in jobs]
    ids, labels = found[0].ids.numpy(), found[0].labels.numpy()
    correct = np.stack([(seed.classes == seed.labels).numpy() for seed in found]).astype(np.float64)
    classes = np.array(jobs[0].dataset.manifest.classes)
    return Measured(ids, classes[labels], correct.mean(0))


def _read_parts(folder: Storage) -> Measured:
    """Read the predictions that `mae evaluate` wrote, by names of classes: classifiers may order them differently."""
    paths = [path for path, _ in folder.list("predictions", suffix=".parquet")]
    columns = ["id", "label", "predicted"]
    table = pa.concat_tables([pq.read_table(pa.BufferReader(folder.read(path)), columns=columns) for path in paths])
    table = table.drop_null().sort_by("id")
    labels, predicted = (np.array(table[name].to_pylist(), dtype=np.str_) for name in ("label", "predicted"))
    return Measured(table["id"].to_numpy(), labels, (labels == predicted).astype(np.float64))
