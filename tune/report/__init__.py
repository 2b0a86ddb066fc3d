"""The report of a sweep: charts, reconstructions and one page with both."""

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mae_core
from mae_core.errors import UserError
from pipelines.config import SweepConfig
from pipelines.registry import Tracking
from pipelines.storage import Storage
from tune.report.charts import charts_of, label_of
from tune.report.page import RATIOS, Row, Study, page, point_text
from tune.results import measured_baselines, measured_points, varied_fields
from tune.trial import CLOSED, Trial

log = logging.getLogger(__name__)

_MAX_PICTURED = 40
"""Points with reconstructions on the page, the best ones if there are more."""


def write_report(
    storage: Storage, config: SweepConfig, trials: Sequence[Trial], result: dict[str, Any], tracking: Tracking
) -> dict[str, bytes]:
    """Write report.html into the sweep's folder; return its charts as PNG and SVG by file name.

    `result` is that of the sweep, with `best.yaml` in the folder already.
    """
    points, baselines = measured_points(result["trials"]), measured_baselines(result["trials"])
    charts = charts_of(points, baselines)
    server = "http://127.0.0.1:5000" if tracking.uri.startswith("sqlite:") else tracking.shown
    manifest = trials[0].manifest
    study = Study(
        name=result["run"],
        question=config.question or _question(points),
        entries=result["trials"],
        best_key=result["best_key"],
        select_by=config.select_by,
        tests=result["tests"],
        charts=charts,
        reconstructions=_pictures(config, trials, result),
        preset=storage.read("best.yaml").decode(),
        command=shlex.join(["mae", *sys.argv[1:]]),
        facts={
            "dataset": f"{trials[0].main.config.data.uri}, digest {manifest.digest[:12]}",
            "training images": f"{manifest.splits['train'].num_rows:,}",
            "folder": storage.uri,
            "versions": f"mae-ray {mae_core.__version__}, torch {version('torch')}, ray {version('ray')}",
        },
        links={
            trial.key: f"{server}/#/experiments/{tracking.experiment_id}/runs/{run_id}"
            for trial in trials
            if (run_id := _run_id(trial))
        },
        link_note=f"Links need MLflow: {tracking.ui_command}.",
        num_unrun=result["num_unrun"],
    )
    storage.write("report.html", page(study))
    return {f"{chart.name}.png": chart.png for chart in charts} | {f"{chart.name}.svg": chart.svg for chart in charts}


def _question(points: Sequence[Any]) -> str:
    fields = [label_of(field).split(" (")[0] for field in varied_fields(points)]
    if not fields:
        return "What is the encoder worth?"
    return f"How does accuracy depend on {', '.join(fields[:-1])}{' and ' if fields[1:] else ''}{fields[-1]}?"


def _pictures(config: SweepConfig, trials: Sequence[Trial], result: dict[str, Any]) -> dict[float, list[Row]]:
    """Return reconstructions by the first seed of each point; none if they cannot be drawn, which costs no result."""
    # It imports torch, which drivers do without until they read weights.
    from tune.report.pictures import reconstruction_rows

    points = measured_points(result["trials"])
    shown = points
    if len(points) > _MAX_PICTURED:
        ranked = sorted(points, key=lambda m: -m.of(config.select_by).mean)[:_MAX_PICTURED]
        shown = [measured for measured in points if measured in ranked]
    by_key = {trial.key: trial for trial in trials}
    pretrainings: dict[str, tuple[Trial, str]] = {}
    for measured in shown:
        trial = by_key[measured.entries[0]["key"]]
        assert trial.pretrain is not None
        # Points that share a pretraining share its reconstructions.
        text = point_text(measured, points) or "pretrained"
        pretrainings.setdefault(trial.pretrain.folder, (trial, text))
    try:
        return reconstruction_rows(*zip(*pretrainings.values()))
    except UserError as error:
        log.warning("the report has no reconstructions: %s", error)
        return {ratio: [] for ratio in RATIOS}


def _run_id(trial: Trial) -> str:
    return json.loads(trial.storage.read(CLOSED))["run_id"] if trial.storage.exists(CLOSED) else ""
