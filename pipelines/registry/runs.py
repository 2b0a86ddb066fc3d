"""One MLflow run: its parameters, points, files and status, each written once even if the driver restarts."""

import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from mae_core.errors import UserError
from pipelines.registry.outages import RETRY_LIMIT_S, retry
from pipelines.registry.points import Point, PointSender
from pipelines.registry.versions import ModelRef

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from pipelines.dataset.manifest import Manifest

Kind = Literal["pretrain", "finetune", "probe", "sweep", "trial", "import", "evaluate", "segment", "look", "gate"]
Context = Literal["training", "evaluation"]
"""What a run uses its dataset for; MLflow's term."""
End = Literal["FINISHED", "FAILED", "KILLED"]

BACKBONE_TAG = "mae.backbone"

_MAX_KEY, _MAX_VALUE, _PARAMS_PER_REQUEST = 250, 6000, 100
_MAX_DIGEST = 36
_SAMPLE_EVERY_S = 10.0


class Run:
    """An existing MLflow run. Create it with `Tracking.run`."""

    def __init__(self, client: "MlflowClient", *, id: str, name: str, experiment_id: str) -> None:
        self.client = client
        self.id = id
        self.name = name
        self.experiment_id = experiment_id
        self._points = PointSender(self._send)
        self._machine: MachineSampler | None = None

    def start(self, config: dict[str, Any], dataset: "Manifest | None", dataset_uri: str, context: Context) -> None:
        """Mark the run as running, log its parameters and dataset, and start sampling this machine's system metrics."""
        known = retry(lambda: self.client.get_run(self.id), "the run")
        params = {k: v for k, v in flatten(config).items() if k not in known.data.params}
        retry(lambda: self.client.update_run(self.id, status="RUNNING"), "the run's start")
        retry(lambda: self._log_params(params), "parameters")
        if dataset is not None:
            self.log_dataset(dataset, dataset_uri, context)
        self._machine = MachineSampler(self, known.data._metric_objs)

    def last_steps(self) -> dict[str, int]:
        """Return the last step of every metric that MLflow has."""
        run = retry(lambda: self.client.get_run(self.id), "the run")
        # The only API that returns steps without fetching the full history of each metric.
        return {metric.key: metric.step for metric in run.data._metric_objs}

    def record(self) -> tuple[dict[str, str], dict[str, float]]:
        """Return the run's parameters, and the last value of each of its metrics."""
        data = retry(lambda: self.client.get_run(self.id), "the run").data
        return dict(data.params), dict(data.metrics)

    @property
    def backbone(self) -> str:
        """Model version that the run started from, as `log_model_input` recorded it; empty if there is none."""
        return retry(lambda: self.client.get_run(self.id), "the run").data.tags.get(BACKBONE_TAG, "")

    def log_points(self, points: Sequence[Point | tuple[str, float, int, int]]) -> None:
        """Queue points (key, value, step, time in ms), each to be stored once, and return at once."""
        self._points.add([Point(*point) for point in points])

    @property
    def num_waiting(self) -> int:
        """Number of points that MLflow has not confirmed."""
        return self._points.num_waiting

    def flush(self, limit_s: float = RETRY_LIMIT_S) -> None:
        """Wait until MLflow has every point. Raises TrackingUnreachable if that takes longer than `limit_s`."""
        self._points.flush(limit_s)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log the file as an artifact of the run in that relative folder.

        Raises UserError for a folder outside the run.
        """
        inside = PurePosixPath(folder)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"artifact folder {folder!r} is outside the run; try a relative one such as pictures")
        target = None if str(inside) == "." else str(inside)
        retry(lambda: self.client.log_artifact(self.id, str(path), target), path.name)

    def log_dataset(self, manifest: "Manifest", uri: str, context: Context) -> None:
        """Record a dataset that the run reads, and what for."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {
            "num_images": manifest.num_ok,
            "channels": manifest.channels,
            "num_classes": len(manifest.classes or ()),
            "rows": {name: split.num_rows for name, split in manifest.splits.items()},
            "digest": manifest.digest,
        }
        dataset = Dataset(
            name=_shown(uri).rstrip("/").rsplit("/", 1)[-1] or "dataset",
            digest=manifest.digest[:_MAX_DIGEST],
            source_type="s3" if uri.startswith("s3:") else "local",
            source=json.dumps({"uri": _shown(uri)}),
            profile=json.dumps(profile),
        )
        tags = [InputTag("mlflow.data.context", context)]
        retry(lambda: self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, tags)]), "the dataset")

    def log_model_input(self, ref: ModelRef, tag: str = BACKBONE_TAG) -> None:
        """Record which model version the run started from, or used, also as a tag."""
        from mlflow.entities import LoggedModelInput

        models = [LoggedModelInput(ref.model_id)]
        retry(lambda: self.client.log_inputs(self.id, models=models), ref.uri)
        self.set_tags({tag: ref.uri})

    def log_model_metrics(self, ref: ModelRef, values: Mapping[str, float]) -> None:
        """Log metrics of the run that are of this model version, so that MLflow shows them with the version too."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, value, now_ms, 0, model_id=ref.model_id) for key, value in values.items()]
        retry(lambda: self.client.log_batch(self.id, metrics=metrics), "metrics")

    def set_tags(self, tags: dict[str, str], limit_s: float = RETRY_LIMIT_S) -> None:
        """Set tags on the run. Raises TrackingUnreachable after `limit_s`."""
        from mlflow.entities import RunTag

        if tags:
            entities = [RunTag(key, str(value)) for key, value in tags.items()]
            retry(lambda: self.client.log_batch(self.id, tags=entities), "tags", limit_s)

    def finish(self, status: End = "FINISHED", limit_s: float = RETRY_LIMIT_S) -> None:
        """Wait until every point has arrived, then set the run's final status.

        Raises TrackingUnreachable after `limit_s`.
        """
        self.close(limit_s)
        retry(lambda: self.client.set_terminated(self.id, status), "the run's end", limit_s)

    def close(self, limit_s: float = RETRY_LIMIT_S) -> None:
        """Wait until every point has arrived, and leave the run running, for `Tracking.run` to open it again.

        Raises TrackingUnreachable after `limit_s`.
        """
        if self._machine is not None:
            self._machine.stop()
            self._machine = None
        try:
            self._points.flush(limit_s)
        finally:
            self._points.close()

    def _send(self, batch: list[Point]) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(self.id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in batch])

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for i in range(0, len(entities), _PARAMS_PER_REQUEST):
            self.client.log_batch(self.id, params=entities[i : i + _PARAMS_PER_REQUEST])


class MachineSampler:
    """A thread that logs this machine's CPU, memory, disk, network and GPU figures as system/... points.

    It uses only the sampling of MLflow's own monitor, because that monitor stops at the first request that fails.
    """

    def __init__(self, run: Run, earlier: "Sequence[Metric]") -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._run = run
        self._source = SystemMetricsMonitor(run.id, tracking_uri=run.client.tracking_uri)
        self._every_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SAMPLE_EVERY_S)
        self._step = max([m.step for m in earlier if m.key.startswith("system/")], default=-1) + 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="mlflow-machine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait until it has ended."""
        self._stop.set()
        self._thread.join(timeout=self._every_s)

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._source.collect_metrics()
            values, now_ms = self._source.aggregate_metrics(), int(time.time() * 1000)
            for monitor in self._source.monitors:
                monitor.clear_metrics()
            try:
                self._run.log_points([(f"system/{k}", float(v), self._step, now_ms) for k, v in values.items()])
            except ValueError:
                return  # MLflow refused a point for good; `Run.finish` raises that error
            self._step += 1
            self._stop.wait(self._every_s)


def first_tags(
    key: str, kind: Kind, dataset: "Manifest | None", parent: Run | None, tags: dict[str, str]
) -> dict[str, str]:
    """Return the tags of a new run. A restarted driver finds its run by `mae.run_key`."""
    found = {"mae.run_key": key, "mae.kind": kind, **commit_tags(), **tags}
    if dataset is not None:
        found["mae.dataset_digest"] = dataset.digest
    if parent is not None:
        found["mlflow.parentRunId"] = parent.id
    return found


def commit_tags() -> dict[str, str]:
    """Return the commit of this code and whether it has uncommitted changes; empty if this is not a git checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return {}
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "mae.uncommitted_changes": str(changed).lower()}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a config to dotted keys and strings, without passwords in URLs, truncated to MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[_short_key(dotted)] = _shown(value if isinstance(value, str) else json.dumps(value))[:_MAX_VALUE]
    return flat


def _short_key(dotted: str) -> str:
    clean = re.sub(r"[^\w. /:-]", "_", dotted)
    if len(clean) <= _MAX_KEY:
        return clean
    return f"{clean[: _MAX_KEY - 9]}-{hashlib.sha256(dotted.encode()).hexdigest()[:8]}"


def _shown(uri: str) -> str:
    """Return the text without user, password and query string of any URL in it."""
    return re.sub(r"(\w://)(?:[^/@\s]*@)?([^?\s\"]*)(\?[^\s\"]*)?", r"\1\2", uri)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
