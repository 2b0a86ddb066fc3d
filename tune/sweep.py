"""Sweep: pretrain, probe and fine-tune every point; register the best on val, then evaluate it on test once."""

import dataclasses
import hashlib
import json
import logging
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import registry
from pipelines.cluster import ray_address, ray_session
from pipelines.config import SweepConfig, identity, run_name, to_dict
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.drive import mark_interrupted
from pipelines.drivers.launch import launch
from pipelines.drivers.pretrain import publisher
from pipelines.errors import CommandFailed
from pipelines.interrupts import stopping_at
from pipelines.registry import Point
from pipelines.runs.checkpoints import Retention
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, IndexedDataset
from pipelines.storage import Storage, open_storage
from tune.space import at
from tune.summary import Entry, best_of, figure_of, preset_of, report
from tune.trial import MEASURES, Measure, Trial, classify_job, grouped, of_trial, plan, settled, with_choices

log = logging.getLogger(__name__)

_SUMMARY, _MARKER = "summary.json", "sweep.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sweep:
    """A sweep that has been validated but not yet run."""

    config: SweepConfig
    name: str
    storage: Storage
    manifest: Manifest
    trials: list[Trial]
    identity: str


def sweep(config: SweepConfig, preset: str, *, fresh: bool = False) -> dict[str, Any]:
    """Run the sweep; return its table, best point and preset, test accuracy and model version.

    The same command resumes an unfinished sweep, retries failed trials, and repeats a finished result. Raises UserError
    for what the user can fix, before anything is written, CommandFailed if every trial failed, and Interrupted, which
    says how many trials are finished, after a signal.
    """
    checked = _check(config, preset)
    if fresh:
        _clear(checked.storage)
    known = _summary(checked)
    if known is not None:
        log.info("sweep %s is finished; --fresh runs it again", checked.name)
        return known
    registry.refuse_local_tracking(ray_address())
    checked = dataclasses.replace(checked, trials=with_choices(checked.trials, checked.config.max_concurrent))
    tracking = registry.open_tracking(checked.config.pretrain.tracking.experiment)
    parent = tracking.run(
        checked.name,
        "sweep",
        to_dict(checked.config),
        tags={"mae.folder": checked.storage.uri},
        dataset=checked.manifest,
        dataset_uri=checked.config.pretrain.data.uri,
        key=_claim(checked),
    )
    try:
        with stopping_at(lambda: _progress(checked)):
            result = _run(checked, tracking, parent)
    except KeyboardInterrupt as interrupt:
        mark_interrupted(parent, str(interrupt))
        raise
    except BaseException:
        parent.finish("FAILED")
        raise
    parent.finish("FINISHED")
    checked.storage.write(_SUMMARY, _json(result | {"identity": checked.identity}))
    return result


def _progress(checked: _Sweep) -> str:
    num_finished = sum(trial.is_finished() for trial in checked.trials)
    return f"{checked.name} stopped with {num_finished} of {len(checked.trials)} trials finished"


def _check(config: SweepConfig, preset: str) -> _Sweep:
    """Return the sweep with its trials. Raises UserError for every mistake that can be found without training."""
    config, manifest = settled(config)
    # Concurrency and the selection criterion do not change the trials.
    fixed = dataclasses.replace(
        config,
        max_concurrent=1,
        trials_per_group=1,
        select_by="finetune",
        **{measure: of_trial(getattr(config, measure), config.pretrain) for measure in MEASURES},
    )
    name = run_name(fixed, preset, manifest.digest)
    storage = open_storage(open_storage(config.output).join(name))
    trials = plan(config, storage)
    content = json.dumps([identity(fixed), config.select_by, [trial.key for trial in trials]], sort_keys=True)
    return _Sweep(
        config=config,
        name=name,
        storage=storage,
        manifest=manifest,
        trials=trials,
        identity=hashlib.sha256(content.encode()).hexdigest(),
    )


def _claim(checked: _Sweep) -> str:
    """Return the id of the sweep's folder, created at its first start, by which the MLflow run is found."""
    if checked.storage.exists(_MARKER):
        return json.loads(checked.storage.read(_MARKER))["id"]
    key = uuid.uuid4().hex
    content = {"id": key, "config": to_dict(checked.config)}
    checked.storage.write(_MARKER, json.dumps(content, indent=1).encode())
    return key


def _clear(storage: Storage) -> None:
    """Delete an earlier sweep, its summary first and its marker last. A folder without a marker is left alone."""
    if storage.exists(_MARKER):
        for path in sorted((path for path, _ in storage.list()), key=lambda path: (path != _SUMMARY, path == _MARKER)):
            storage.delete(path)


def _summary(checked: _Sweep) -> dict[str, Any] | None:
    """Return the result of the finished sweep; None if it is unfinished, another sweep's, or has failed trials."""
    if not checked.storage.exists(_SUMMARY):
        return None
    found = json.loads(checked.storage.read(_SUMMARY))
    if found.pop("identity") != checked.identity or any(entry["error"] for entry in found["trials"]):
        return None
    return found


def _run(checked: _Sweep, tracking: registry.Tracking, parent: registry.Run) -> dict[str, Any]:
    """Run all trials; register, test and plot the best one, and write the result."""
    from tune.search import Children, search

    config, trials = checked.config, checked.trials
    children = Children(tracking, parent, trials)
    children.catch_up(trials)
    unfinished = [trial for trial in trials if not trial.is_finished()]
    if len(unfinished) < len(trials):
        log.info("%d of %d trials are finished already", len(trials) - len(unfinished), len(trials))
    with ExitStack() as stack:
        if unfinished:
            # Points may differ in their number of workers: size Ray for the largest group.
            largest = max((t.pretrain.compute for t in unfinished), key=lambda c: c.num_workers + c.data_tasks)
            groups = grouped(unfinished, config.trials_per_group)
            stack.enter_context(ray_session(largest, min(config.max_concurrent, len(groups))))
            search(groups, children, config.max_concurrent)
        entries = [trial.entry() or trial.record("the trial ended without a result") for trial in trials]
        if all(entry["error"] for entry in entries):
            raise CommandFailed(f"every trial of sweep {checked.name} failed; first error: {entries[0]['error']}")
        best = best_of(entries, config.select_by)
        winner = next(trial for trial in trials if trial.key == best["key"])
        model = _register(winner, children)
        tests = _test(checked, winner, stack)
    result = _write(checked, entries, best, tests) | {"model": model, "run_id": parent.id}
    result["text"] = report(result)
    _log_result(parent, checked.storage, result, best, tests)
    return result


def _register(winner: Trial, children: Any) -> str:
    """Register the winner's model from the winner's own run, so that lineage leads to its dataset and commit."""
    config = winner.pretrain.config
    if not config.tracking.register:
        return ""
    publish = publisher(config, winner.manifest)
    return publish(children.find(winner), RunFolder(winner.pretrain.folder))["model"]


def _test(checked: _Sweep, winner: Trial, stack: ExitStack) -> dict[Measure, float | None]:
    """Return the winner's top-1 on test, by the classifiers that were measured on val; None without a test split."""
    manifest = winner.manifest
    if "test" not in manifest.splits:
        return dict.fromkeys(MEASURES)
    jobs: dict[Measure, tuple[ClassifyJob, IndexedDataset]] = {}
    for measure in MEASURES:
        on_val: ClassifyJob = getattr(winner, measure)
        on_test = dataclasses.replace(
            on_val.config, eval_split="test", output=checked.storage.join(f"test/{winner.key}")
        )
        jobs[measure] = classify_job(on_test, measure, winner.pretrain, manifest)
        _copy_checkpoint(on_val, jobs[measure][0])
    unread = [(job, dataset) for job, dataset in jobs.values() if RunFolder(job.folder).read_result() is None]
    if unread:
        log.info("evaluating the best trial on test")
        stack.enter_context(ray_session(winner.pretrain.compute))
        launch(unread, f"{checked.name}-test")
    return {measure: (RunFolder(job.folder).read_result() or {})["top1"] for measure, (job, _) in jobs.items()}


def _copy_checkpoint(source: ClassifyJob, target: ClassifyJob) -> None:
    """Copy the source's last checkpoint to the target, which then only has to evaluate."""
    trained, folder = RunFolder(source.folder).checkpoints.latest(), RunFolder(target.folder)
    if trained is not None and not folder.checkpoints.steps():
        folder.checkpoints.save(trained, Retention(newest=1))


def _write(checked: _Sweep, entries: list[Entry], best: Entry, tests: dict[Measure, float | None]) -> dict[str, Any]:
    """Write preset and figure to the sweep's folder; return the result."""
    storage, config = checked.storage, checked.config
    storage.write("best.yaml", preset_of(at(config.pretrain, best["point"]), checked.name, best, tests))
    figure = figure_of(checked.trials, entries)
    if figure:
        storage.write("masking_ratio.png", figure)
    return {
        "run": checked.name,
        "folder": storage.uri,
        "best": best["point"],
        "best_key": best["key"],
        "select_by": config.select_by,
        "best_preset": storage.join("best.yaml"),
        "figure": storage.join("masking_ratio.png") if figure else "",
        **{f"{measure}_val": best[measure] for measure in MEASURES},
        **{f"{measure}_test": tests[measure] for measure in MEASURES},
        "trials": entries,
    }


def _log_result(
    parent: registry.Run, storage: Storage, result: dict[str, Any], best: Entry, tests: dict[Measure, float | None]
) -> None:
    """Log table, summary, figure, preset and final numbers to the sweep's MLflow run."""
    storage.write("table.txt", result["text"].encode() + b"\n")
    with TemporaryDirectory(prefix="mae-sweep-") as scratch:
        (Path(scratch) / _SUMMARY).write_bytes(_json(result))
        for name in ("table.txt", "best.yaml", *(["masking_ratio.png"] if result["figure"] else [])):
            (Path(scratch) / name).write_bytes(storage.read(name))
        for path in sorted(Path(scratch).iterdir()):
            parent.log_file(path)
    now_ms = int(time.time() * 1000)
    values = {f"{m}_top1": best[m] for m in MEASURES} | {f"{m}_test_top1": tests[m] for m in MEASURES}
    parent.log_points([Point(key, value, 0, now_ms) for key, value in values.items() if value is not None])
    parent.set_tags({"mae.best": json.dumps(result["best"]), "mae.model": result["model"]})


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, indent=1).encode()
