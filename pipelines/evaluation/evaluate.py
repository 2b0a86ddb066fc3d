"""`mae evaluate`: a classifier on one split of a prepared dataset, from predictions to metrics, pictures and report."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mae_core.errors import UserError
from mae_core.pretrained import Classifier, classifier_of
from pipelines import registry
from pipelines.config import EvaluateConfig, to_dict
from pipelines.dataset.manifest import Manifest, check_value_range, read_manifest
from pipelines.evaluation.metrics import Metrics, measure
from pipelines.evaluation.models import device_of, digest_of, needed_tracking
from pipelines.evaluation.outputs import claim, log_run, write_files
from pipelines.evaluation.predictions import predict, read_predictions
from pipelines.evaluation.report import html_report
from pipelines.pictures.classifier_figures import confusion_figure, reliability_figure
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_IDENTITY = "evaluation.json"
_MOST_NAMED = 20
_TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "macro AUROC",
    "ece": "calibration error (ECE)",
}


@dataclass(frozen=True)
class _Model:
    """A classifier, its version if it is registered, and the digest of its files."""

    classifier: Classifier
    ref: registry.ModelRef | None
    digest: str
    shown: str


def evaluate(config: EvaluateConfig, out: str) -> dict[str, Any]:
    """Evaluate a classifier on a split and write predictions, pictures, report.html and result.json; return the result.

    The same command resumes after the last part of the predictions that was written. Raises UserError before anything
    is written if model and dataset do not fit each other, or if `out` holds another evaluation.
    """
    uri, manifest = _labelled(config)
    tracking = needed_tracking(config.model, config.experiment, log=config.log)
    model = _load(config.model, tracking)
    check_classes(manifest.classes, model.classifier.classes, config.data, model.shown)
    if manifest.channels not in (1, model.classifier.channels):
        raise UserError(
            f"dataset {config.data} has {manifest.channels} channels but {model.shown} takes "
            f"{model.classifier.channels}; evaluate a classifier that was trained on such images"
        )
    check_value_range(config.data, manifest, model.classifier.normalization, model.shown)
    storage = open_storage(out)
    identity = {"model": model.digest, "dataset": manifest.digest, "split": config.split}
    claim(storage, _IDENTITY, identity, "evaluation")
    _predict(model.classifier, uri, manifest, config, storage)
    predictions, failed = read_predictions(storage, model.classifier.classes)
    if not len(predictions.ids):
        raise UserError(
            f"none of the {len(failed)} images of split {config.split!r} can be decoded; prepare them again"
        )
    metrics = measure(predictions, num_bins=config.num_bins, num_resamples=config.num_resamples, seed=config.seed)
    result = _result(config, model, manifest, metrics, failed)
    files = _files(result, metrics, model.classifier.classes)
    if tracking is not None and config.log:
        made_by, points = [identity, to_dict(config)], _points(result, config.split)
        dataset = {"dataset": manifest, "dataset_uri": uri, "context": "evaluation"}
        result["run_id"] = log_run(
            tracking, "evaluate", to_dict(config), made_by, model, files, result, metrics=points, **dataset
        )
    result["out"] = storage.uri
    write_files(storage, files, result)
    return result | {"text": _text(result)}


def check_classes(dataset: Sequence[str], classifier: Sequence[str], uri: str, model: str) -> None:
    """Raise UserError if the classifier does not know a class of the dataset: classes are matched by name."""
    unknown = [name for name in dataset if name not in set(classifier)]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {len(dataset)} classes of {uri} are unknown to {model}: {_named(unknown)}; "
            f"it knows {_named(classifier)}; rename the folders of the source to these names and prepare it again, "
            "or fine-tune a classifier on this dataset"
        )


def _labelled(config: EvaluateConfig) -> tuple[str, Manifest]:
    if not config.data:
        raise UserError("no dataset is given; try --data with a folder or s3:// prefix written by `mae prepare`")
    storage = open_storage(config.data)
    manifest = read_manifest(storage)
    if not manifest.is_labelled:
        raise UserError(f"dataset {config.data} is unlabelled, but an evaluation needs labels; {manifest.how_to_label}")
    if manifest.label_sets:
        raise UserError(
            f"dataset {config.data} has several classes an image, and `mae evaluate` measures classifiers of one; "
            "`mae finetune` reports the mean average precision"
        )
    num_rows = manifest.split(config.split).num_rows
    if not num_rows:
        raise UserError(f"split {config.split!r} of {config.data} has no image; try another --split")
    if manifest.num_unlabelled.get(config.split, 0) == num_rows:
        others = [
            name for name, split in manifest.splits.items() if manifest.num_unlabelled.get(name) != split.num_rows
        ]
        raise UserError(
            f"the {num_rows} images of split {config.split!r} of {config.data} are unlabelled; "
            + (f"try --split {others[0]}" if others else manifest.how_to_label)
        )
    return storage.uri, manifest


def _load(model: str, tracking: registry.Tracking | None) -> _Model:
    remedy = "train a classifier from it with `mae finetune --model {model}`"
    files = registry.read_model(model, "classifier.safetensors", remedy=remedy, tracking=tracking)
    digest = digest_of(files.sha256.values())
    return _Model(classifier_of(files.values, files.tensors), files.ref, digest, files.shown)


def _predict(classifier: Classifier, uri: str, manifest: Manifest, config: EvaluateConfig, storage: Storage) -> None:
    total, done, said_s = manifest.split(config.split).num_rows, 0, time.monotonic()
    device = device_of(gpu=config.gpu)
    for num_images in predict(classifier, uri, manifest, config.split, storage, batch=config.batch, device=device):
        done += num_images
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            log.info("%d of %d images", done, total)
    assert done == total, f"{done} of {total} images were predicted"


def _result(
    config: EvaluateConfig, model: _Model, manifest: Manifest, metrics: Metrics, failed: list[tuple[str, str]]
) -> dict[str, Any]:
    total, num_unlabelled = manifest.split(config.split).num_rows, manifest.num_unlabelled.get(config.split, 0)
    notes = [f"{num_unlabelled} of {total} images have no label and are left out"] if num_unlabelled else []
    if metrics.absent:
        notes.append(
            f"{len(metrics.absent)} of {len(model.classifier.classes)} classes have no image in the split and are left "
            f"out of macro means: {_named(metrics.absent)}"
        )
    if failed:
        notes.append(f"{len(failed)} of {total} images could not be decoded and are left out of every metric")
    if "auroc" in metrics.overall and config.num_resamples > metrics.overall["auroc"].num_resamples:
        used = metrics.overall["auroc"].num_resamples
        notes.append(f"the interval of the AUROC rests on {used} resamples, since the split is large" if used else
                     "the AUROC has no interval, since the split is too large to resample it in minutes")  # fmt: skip
    if "top5" not in metrics.overall:
        notes.append(f"top-5 is left out: of {len(model.classifier.classes)} classes it says nothing")
    if "auroc" not in metrics.overall:
        notes.append("the AUROC is left out: only one class has images")
    return {
        "model": model.shown,
        "data": config.data,
        "dataset_digest": manifest.digest,
        "split": config.split,
        "num_images": total,
        "num_evaluated": total - num_unlabelled - len(failed),
        "num_undecodable": len(failed),
        "undecodable": [{"source": source, "reason": reason} for source, reason in failed],
        "metrics": {name: dataclasses.asdict(interval) for name, interval in metrics.overall.items()},
        "per_class": {
            name: {
                "num_images": count,
                "accuracy": metrics.class_accuracy[name],
                "auroc": metrics.class_auroc.get(name),
            }
            for name, count in metrics.class_counts.items()
        },
        "absent_classes": metrics.absent,
        "notes": notes,
        "seed": config.seed,
    }


def _files(result: dict[str, Any], metrics: Metrics, classes: Sequence[str]) -> dict[str, bytes]:
    """Return the pictures and the report, by name."""
    title = f"{result['model'].removeprefix('models:/')} on {result['split']}"
    bins, error = metrics.bins, metrics.overall["ece"].value
    pictures = {
        "confusion.png": confusion_figure(metrics.confusion, classes, title),
        "reliability.png": reliability_figure(bins.counts, bins.accuracy, bins.confidence, error, title),
    }
    overall = [["metric", "value (%)", "95 % interval"]]
    overall += [[_TITLES[name], f"{m['value']:.2f}", _interval(m)] for name, m in result["metrics"].items()]
    per_class = [["class", "images", "accuracy (%)", "AUROC (%)"]]
    worst_first = sorted(result["per_class"].items(), key=lambda item: item[1]["accuracy"])
    for name, found in worst_first:
        area = "" if found["auroc"] is None else f"{found['auroc']:.2f}"
        per_class.append([name, found["num_images"], f"{found['accuracy']:.2f}", area])
    undecodable = [["image", "reason"], *([row["source"], row["reason"]] for row in result["undecodable"])]
    facts = {key: result[key] for key in ("model", "data", "dataset_digest", "split", "num_images", "num_evaluated")}
    tables = {"Metrics": overall, "Classes, least accurate first": per_class}
    report = html_report(
        title,
        facts,
        result["notes"],
        tables | ({"Images that could not be decoded": undecodable} if len(undecodable) > 1 else {}),
        {"Confusion": pictures["confusion.png"], "Calibration": pictures["reliability.png"]},
    )
    return pictures | {"report.html": report}


def _points(result: dict[str, Any], split: str) -> dict[str, float]:
    """Return each metric and the ends of its interval, where they are defined, by their names in MLflow."""
    return {
        f"{split}/{name}{suffix}": interval[key]
        for name, interval in result["metrics"].items()
        for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high"))
        if interval[key] is not None
    }


def _text(result: dict[str, Any]) -> str:
    """Format the result as the table that is printed."""
    lines = [f"{result['model']} on {result['num_evaluated']} images of {result['split']}", ""]
    lines += [f"{_TITLES[name]:26}{m['value']:7.2f} %   {_interval(m)}" for name, m in result["metrics"].items()]
    lines += ["", *(f"note: {note}" for note in result["notes"])]
    return "\n".join([*lines, f"report: {result['out']}/report.html"])


def _interval(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f"{metric['low']:.2f} to {metric['high']:.2f}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
