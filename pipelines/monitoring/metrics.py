"""The metrics that `mae exporter` exports, and how they follow from what was read.

Dashboards and alert rules in infra/monitoring use these names; a test compares them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pipelines.monitoring.datasets import DatasetCounts
from pipelines.registry import RegistryCounts
from pipelines.runs.listing import Observation

Family = CounterMetricFamily | GaugeMetricFamily

LIVE = {
    "images_per_s": ("mae_run_images_per_second", "Images trained on per second, of all ranks"),
    "mfu": ("mae_run_mfu_ratio", "Share of the attainable floating-point operations (GPUs only)"),
    "gpu/memory": ("mae_run_gpu_memory_ratio", "Peak share of the memory of rank 0's GPU"),
    "train/loss": ("mae_run_loss", "Training loss"),
}
"""Metrics of running runs: name and help, by their name in MLflow."""

_GOODPUT = "goodput/"


@dataclass(frozen=True)
class Read:
    """When a part was last read (Unix seconds), at first when the exporter began, and how often that failed."""

    read_s: float
    num_errors: int = 0


def run_families(runs: Mapping[str, Observation]) -> Iterator[Family]:
    """Yield what runs tell, by the name of the run. Rates and shares are those of running runs alone."""
    state = _gauge("mae_run_state", "1 for the state of the run", "run", "kind", "state")
    step = _gauge("mae_run_step", "Last step with metrics; 0 before the first", "run")
    total = _gauge("mae_run_total_steps", "Steps of the whole run", "run")
    saved = _gauge("mae_run_checkpoint_step", "Step of the newest checkpoint; 0 for none", "run")
    saved_s = _gauge("mae_run_checkpoint_timestamp_seconds", "When the newest checkpoint's state was copied", "run")
    started_s = _gauge("mae_run_started_timestamp_seconds", "Start of the run's last driver", "run")
    alive_s = _gauge("mae_run_alive_timestamp_seconds", "Last heartbeat of a driver", "run")
    waiting = _gauge("mae_run_mlflow_points_waiting", "Metric points that MLflow has not confirmed", "run")
    failures = CounterMetricFamily("mae_run_failures", "Early ends of worker groups", labels=["run"])
    bad_steps = CounterMetricFamily("mae_run_bad_steps", "Steps whose gradient was not finite", labels=["run"])
    goodput = _gauge("mae_run_goodput_ratio", "Share of the run's time so far, by what it went into", "run", "share")
    live = {key: _gauge(name, help, "run") for key, (name, help) in LIVE.items()}
    for run, found in runs.items():
        status = found.status
        state.add_metric([run, status.kind, status.state], 1)
        failures.add_metric([run], found.num_failures)
        bad_steps.add_metric([run], found.num_bad_steps)
        _add(step, run, status.step or 0)
        _add(total, run, status.total_steps)
        _add(saved, run, status.checkpoint or 0)
        # Until the first checkpoint, what would be lost began with the driver.
        _add(saved_s, run, found.checkpoint_s or found.started_s)
        _add(started_s, run, found.started_s)
        _add(alive_s, run, found.alive_s)
        if status.state == "running":
            _add(waiting, run, found.num_waiting)
            for key, family in live.items():
                _add(family, run, found.values.get(key))
            for key in sorted(key for key in found.values if key.startswith(_GOODPUT)):
                goodput.add_metric([run, key.removeprefix(_GOODPUT)], found.values[key])
    yield from (state, step, total, saved, saved_s, started_s, alive_s, waiting, failures, bad_steps, goodput)
    yield from live.values()


def dataset_families(datasets: Iterable[DatasetCounts]) -> Iterator[Family]:
    """Yield what became of the images of prepared datasets, and of those that are being prepared."""
    images = _gauge(
        "mae_dataset_images", "Images that preparing has read, by what became of them", "dataset", "outcome"
    )
    complete = _gauge("mae_dataset_complete", "1 for a prepared dataset, 0 for one that is being prepared", "dataset")
    for found in datasets:
        complete.add_metric([found.dataset], float(found.is_complete))
        for outcome, count in found.num_images.items():
            images.add_metric([found.dataset, outcome], count)
    yield from (images, complete)


def registry_families(counts: RegistryCounts) -> Iterator[Family]:
    """Yield what the registry holds and what happened to its aliases."""
    versions = _gauge("mae_registry_versions", "Versions of a registered model", "model")
    aliases = _gauge("mae_registry_alias_version", "Version that an alias points to", "model", "alias")
    moves = CounterMetricFamily(
        "mae_registry_alias_moves", "Recorded moves of an alias", labels=["model", "alias", "kind"]
    )
    last = _gauge(
        "mae_registry_alias_moved_timestamp_seconds",
        "Last recorded move of an alias",
        "model",
        "alias",
        "kind",
        "forced",
    )
    gates = CounterMetricFamily("mae_registry_gates", "Comparisons by a gate", labels=["verdict"])
    for model, count in counts.num_versions.items():
        versions.add_metric([model], count)
    for (model, alias), version in counts.aliases.items():
        aliases.add_metric([model, alias], version)
    for move in counts.moves:
        for kind in ("promote", "rollback", "outside"):
            moves.add_metric([move.model, move.alias, kind], move.num_by_kind.get(kind, 0))
        last.add_metric([move.model, move.alias, move.kind, str(move.is_forced).lower()], move.moved_s)
    for verdict in ("passed", "refused"):
        gates.add_metric([verdict], counts.gates.get(verdict, 0))
    yield from (versions, aliases, moves, last, gates)


def exporter_families(reads: Mapping[str, Read]) -> Iterator[Family]:
    """Yield how well the exporter itself sees."""
    read_s = _gauge("mae_exporter_read_timestamp_seconds", "When a part was last read, or when reading began", "part")
    errors = CounterMetricFamily("mae_exporter_errors", "Attempts to read a part that failed", labels=["part"])
    for part, read in reads.items():
        read_s.add_metric([part], read.read_s)
        errors.add_metric([part], read.num_errors)
    yield from (read_s, errors)


def _gauge(name: str, help: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, labels=labels)


def _add(family: GaugeMetricFamily, run: str, value: float | None) -> None:
    if value is not None:
        family.add_metric([run], value)
