"""What Prometheus reads of run folders, datasets and a real MLflow, over HTTP and while parts do not respond."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.config import ExporterConfig
from pipelines.monitoring.exporter import Datasets, Exporter, Part, Registry, Runs, export
from pipelines.monitoring.metrics import LIVE
from pipelines.registry import Decision, TrackingUnreachable, open_tracking, register_backbone
from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.folder import RunFolder
from pipelines.runs.listing import Heartbeat
from pipelines.runs.metrics import MetricSpool
from pipelines.storage import Storage
from tests.new_mlflow import new_mlflow
from tests.waiting import EVENT_DEADLINE_S, REQUEST_DEADLINE_S, join, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
VALUES = {"train/loss": 0.5, "images_per_s": 1200.0, "epoch": 1.0, "mfu": 0.4, "gpu/memory": 0.8}
SHARES = {"goodput/steps": 0.7, "goodput/data": 0.2, "goodput/other": 0.1}


def of(part: Part) -> Samples:
    """Read a part once; return its samples by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in part.read()
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def make(folder: Path, saved_s: float | None = None) -> RunFolder:
    """Create a run of four epochs of five steps, with metrics of step 5, a checkpoint, a failure and a bad step."""
    run = RunFolder(str(folder))
    run.claim({"kind": "pretrain", "config": {"epochs": 4}})
    spool = MetricSpool(run.storage)
    spool.add(5, VALUES | SHARES)
    spool.close()
    clock = {} if saved_s is None else {"clock": {"seconds": {}, "time_s": saved_s}}
    run.checkpoints.save(Checkpoint(step=4, files={}, meta=clock), Retention(newest=1))
    run.add_failure("rank 1 died")
    run.record_bad_step(3, [1, 2])
    return run


def test_a_running_run_shows_its_rate_goodput_and_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "a", saved_s=1_700_000_000.0)
    with Heartbeat([run.storage], lambda: [7]):
        found = of(Runs([str(tmp_path / "runs")]))
    assert value(found, "mae_run_state", run="a", kind="pretrain", state="running") == 1
    assert value(found, "mae_run_step", run="a") == 5
    assert value(found, "mae_run_total_steps", run="a") == 20
    assert value(found, "mae_run_checkpoint_step", run="a") == 4
    assert value(found, "mae_run_checkpoint_timestamp_seconds", run="a") == 1_700_000_000
    assert value(found, "mae_run_mlflow_points_waiting", run="a") == 7
    assert value(found, "mae_run_failures_total", run="a") == 1
    assert value(found, "mae_run_bad_steps_total", run="a") == 1
    assert {key: value(found, name, run="a") for key, (name, _) in LIVE.items()} == {k: VALUES[k] for k in LIVE}
    shares = {key.removeprefix("goodput/"): share for key, share in SHARES.items()}
    assert {s: value(found, "mae_run_goodput_ratio", run="a", share=s) for s in shares} == shares
    started_s = value(found, "mae_run_started_timestamp_seconds", run="a")
    assert started_s is not None
    assert abs(started_s - time.time()) < 60


def test_a_run_that_does_not_run_has_a_state_and_no_rate(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(RuntimeError), Heartbeat([run.storage]):
        raise RuntimeError("no room")
    found = of(Runs([str(tmp_path)]))
    name = tmp_path.name
    assert value(found, "mae_run_state", run=name, kind="pretrain", state="failed") == 1
    assert value(found, "mae_run_images_per_second", run=name) is None
    assert value(found, "mae_run_goodput_ratio", run=name, share="data") is None
    started_s = value(found, "mae_run_started_timestamp_seconds", run=name)
    assert started_s is not None
    assert value(found, "mae_run_checkpoint_timestamp_seconds", run=name) == started_s, "the checkpoint says no time"


def test_a_finished_run_is_read_once_and_again_if_it_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "runs" / "a")
    run.mark_published({})
    runs = Runs([str(tmp_path / "runs")])
    first = of(runs)
    read: list[str] = []
    original = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, path, *more: (read.append(path), original(self, path, *more))[1])
    assert of(runs) == first
    assert read == []
    run.storage.delete("outcome.json")
    assert value(of(runs), "mae_run_state", run="a", kind="pretrain", state="stopped") == 1


def test_images_are_counted_in_prepared_datasets_and_while_they_are_prepared(
    tiles: tuple[str, object], tmp_path: Path
) -> None:
    done = tmp_path / "unfinished" / ".prepare" / "done"
    done.mkdir(parents=True)
    (tmp_path / "unfinished" / "train").mkdir()
    (tmp_path / "unfinished" / "train" / "part-00000.parquet").write_bytes(b"")
    (done / "000000-aa.json").write_text(json.dumps({"num_entries": 30, "reasons": {"truncated": 3}}))
    datasets = Datasets([str(tmp_path)])
    found = of(datasets)
    prepared, unfinished = tiles[0], str(tmp_path / "unfinished")
    assert value(found, "mae_dataset_complete", dataset=prepared) == 1
    assert value(found, "mae_dataset_images", dataset=prepared, outcome="ok") == 60
    assert value(found, "mae_dataset_complete", dataset=unfinished) == 0
    (done / "000001-bb.json").write_text(json.dumps({"num_entries": 10, "reasons": {}}))
    found = of(datasets)
    assert value(found, "mae_dataset_images", dataset=unfinished, outcome="ok") == 37
    assert value(found, "mae_dataset_images", dataset=unfinished, outcome="quarantined") == 3
    assert of(Datasets([prepared])).keys() < found.keys()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_versions_aliases_and_moves_of_a_real_registry_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    tracking = open_tracking("mae")
    run = tracking.run("p", "pretrain", {})
    config = json.dumps({"kind": "backbone", "pixels": {"mean": [0.3], "std": [0.35]}}).encode()
    ref = register_backbone(run, {"encoder.safetensors": b"1", "config.json": config}, "mae-a")
    tracking.run("gate", "gate", {}, tags={"mae.verdict": "refused"}).finish()
    run.finish()
    decision = Decision(kind="promote", why="better", forced=True)
    tracking.move_alias(tracking.history("mae-a", "champion"), ref, decision)
    found = of(Registry())
    assert value(found, "mae_registry_versions", model="mae-a") == 1
    assert value(found, "mae_registry_alias_version", model="mae-a", alias="candidate") == 1
    assert value(found, "mae_registry_alias_version", model="mae-a", alias="champion") == 1
    assert value(found, "mae_registry_alias_moves_total", model="mae-a", alias="champion", kind="promote") == 1
    labels = {"model": "mae-a", "alias": "champion", "kind": "promote", "forced": "true"}
    moved_s = value(found, "mae_registry_alias_moved_timestamp_seconds", **labels)
    assert moved_s is not None
    assert abs(moved_s - time.time()) < 60
    assert value(found, "mae_registry_gates_total", verdict="refused") == 1
    assert value(found, "mae_registry_gates_total", verdict="passed") == 0


def test_a_file_that_nobody_made_yet_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(TrackingUnreachable, match=r"there is no MLflow in .* yet"):
        Registry().read()
    assert list(tmp_path.iterdir()) == []
    # As while another process makes it.
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(TrackingUnreachable, match=r"there is no MLflow in .* yet"):
        Registry().read()
    assert (tmp_path / "mlflow.db").stat().st_size == 0


@contextmanager
def exporting(config: ExporterConfig, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """Run the exporter on a thread; yield its URL."""
    stop = threading.Event()
    thread = threading.Thread(target=export, args=(config, stop.wait))
    with caplog.at_level("INFO"):
        thread.start()
        try:
            yield wait_until(lambda: next((m.split()[-1] for m in caplog.messages if "metrics are at" in m), ""), "URL")
        finally:
            stop.set()
            join(thread)


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=REQUEST_DEADLINE_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_runs_are_served_while_mlflow_does_not_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    make(tmp_path / "runs" / "a")
    config = ExporterConfig(output=(str(tmp_path / "runs"),), port=0, every_s=0.05)
    with exporting(config, caplog) as url:
        name = "mae_exporter_errors_total"
        wait_until(lambda: (value(scrape(url), name, part="registry") or 0) > 1, "two errors", EVENT_DEADLINE_S)
        wait_until(lambda: value(scrape(url), "mae_run_step", run="a") == 5, "the run", EVENT_DEADLINE_S)
        assert value(scrape(url), name, part="runs") == 0
    assert "could not read the registry" in caplog.text


def test_what_was_read_stays_when_reading_fails() -> None:
    class Broken(Runs):
        def read(self):
            raise OSError("the storage is away")

    runs: Part = Runs(["."])
    exporter = Exporter([runs], 1.0)
    exporter.read_once(runs)
    families = len(list(exporter.collect()))
    exporter.read_once(Broken([]))
    assert len(list(exporter.collect())) == families


@pytest.mark.parametrize(
    ("config", "words"),
    [({"output": ()}, "output is empty"), ({"port": 70_000}, "port 70000"), ({"every_s": 0.0}, "every_s 0")],
)
def test_wrong_options_are_refused(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExporterConfig(**config)


def test_a_taken_port_is_refused_with_a_remedy(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = ExporterConfig(output=(str(tmp_path),), port=0, every_s=60)
    with exporting(config, caplog) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .* try another --port"):
            export(ExporterConfig(output=(str(tmp_path),), port=port))
