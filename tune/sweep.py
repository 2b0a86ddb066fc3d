"""Sweep: pretrain, probe and fine-tune every point; register the best on val, then evaluate it on test once."""

import dataclasses
import hashlib
import json
import logging
import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import registry
from pipelines.cluster import ray_address, ray_session
from pipelines.config import SCRATCH, SweepConfig, identity, run_name, to_dict
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.drive import mark_ended
from pipelines.drivers.launch import launch
from pipelines.drivers.pretrain import publisher
from pipelines.errors import CommandFailed
from pipelines.interrupts import stopping_at
from pipelines.registry import Point
from pipelines.runs.checkpoints import Retention
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob
from pipelines.runs.plans import IndexedJob, index_dataset
from pipelines.storage import Storage, open_storage
from tune.budget import Budget, Clock
from tune.planning import of_trial, plan, settled, without_stopped
from tune.report import write_report
from tune.results import Entry, best_of, measured_points
from tune.space import parts_at
from tune.summary import figure_of, preset_of, report
from tune.trial import LABEL_FIELDS, MEASURES, Measure, Trial, grouped, with_choices

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
    except BaseException as error:
        mark_ended(parent, error)
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
    # Concurrency, budget, the selection criterion and reading test do not change the trials; more seeds and baselines
    # only add some.
    fixed = dataclasses.replace(
        config,
        question="",
        seeds=1,
        baselines=False,
        scratch=SCRATCH,
        budget_hours=None,
        max_concurrent=1,
        trials_per_group=1,
        select_by="finetune",
        read_test=True,
        **{measure: of_trial(getattr(config, measure), config.pretrain) for measure in MEASURES},
    )
    name = run_name(fixed, preset, manifest.digest)
    storage = open_storage(open_storage(config.output).join(name))
    trials = plan(config, storage)
    # Which trials tpe chooses follows from the rest.
    keys = [config.seeds, config.baselines] if config.search == "tpe" else [trial.key for trial in trials]
    content = json.dumps([identity(fixed), config.select_by, keys], sort_keys=True)
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
    """Return the result of the finished sweep; None if it is unfinished, another sweep's, or has failed trials.

    A sweep that its budget ended is unfinished for a larger one, and one that left test unread for one that reads it.
    """
    if not checked.storage.exists(_SUMMARY):
        return None
    found = json.loads(checked.storage.read(_SUMMARY))
    if found.pop("identity") != checked.identity or any(entry["error"] for entry in found["trials"]):
        return None
    if found.get("is_test_unread") and checked.config.read_test:
        return None
    hours = checked.config.budget_hours
    if found.get("num_unrun") and (hours is None or hours > found["budget_hours"]):
        return None
    return found


def _run(checked: _Sweep, tracking: registry.Tracking, parent: registry.Run) -> dict[str, Any]:
    """Run all trials; register, test and plot the best one, and write the result."""
    from tune.halving import rungs_of
    from tune.search import Children, search

    config, attempted = checked.config, set[str]()
    num_finished = sum(trial.is_finished() for trial in checked.trials)
    if num_finished:
        log.info("%d of %d trials are finished already", num_finished, len(checked.trials))
    with ExitStack() as stack:
        clock = Clock(checked.storage)
        stack.callback(clock.save)
        while True:
            children = Children(tracking, parent, checked.trials)
            children.catch_up(checked.trials)
            if config.early_stop == "asha":
                checked = dataclasses.replace(checked, trials=without_stopped(checked.trials))
            unfinished = [t for t in checked.trials if not t.is_finished() and t.key not in attempted]
            budget = None
            if config.budget_hours is not None:
                budget = Budget.of(checked.trials, 3600 * config.budget_hours - clock.spent_s())
            if not unfinished or (budget is not None and budget.rest_s <= 0):
                break
            rungs = None
            if config.early_stop == "asha":
                # Halving decides on the points with the first seed; those that are left get every seed.
                unfinished = [trial for trial in unfinished if trial.seed == unfinished[0].seed]
                rungs = rungs_of(config) if unfinished[0].seed == 0 else None
            groups = grouped(unfinished, config.trials_per_group)
            if not attempted:
                # Points may differ in their number of workers: size Ray for the largest group.
                largest = max((t.main.compute for t in unfinished), key=lambda c: c.num_workers + c.data_tasks)
                stack.enter_context(ray_session(largest, min(config.max_concurrent, len(groups))))
            ended = [trial for trial in checked.trials if trial.seed == 0 and trial.is_finished()]
            search(groups, children, config.max_concurrent, budget, rungs=rungs, ended=ended)
            attempted |= {trial.key for trial in unfinished}
            if config.search == "tpe":
                trials = with_choices(plan(config, checked.storage), config.max_concurrent)
                checked = dataclasses.replace(checked, trials=trials)
        trials, entries = checked.trials, _entries(checked)
        best = best_of(entries, config.select_by)
        winners = [trial for trial in trials if trial.pretrain and trial.point == best["point"]]
        model = _register(next(trial for trial in winners if trial.key == best["key"]), children)
        tests = _test(checked, [trial for trial in winners if trial.is_finished()], stack)
    result = _write(checked, entries, best, tests) | {"model": model, "run_id": parent.id}
    files = write_report(checked.storage, config, trials, result, tracking)
    result |= {"report": checked.storage.join("report.html")}
    result["text"] = report(result)
    _log_result(parent, checked.storage, result, files)
    return result


def _entries(checked: _Sweep) -> list[Entry]:
    """Return the entries of all trials that have ended.

    Raises CommandFailed if no point has a result, because all failed or the budget was too small.
    """
    entries = [entry for trial in checked.trials if (entry := trial.entry())]
    if checked.config.budget_hours is None:
        entries = [trial.entry() or trial.record("the trial ended without a result") for trial in checked.trials]
    if measured_points(entries):
        return entries
    if any(entry["error"] for entry in entries):
        error = next(entry["error"] for entry in entries if entry["error"])
        raise CommandFailed(f"every trial of sweep {checked.name} failed; first error: {error}")
    raise CommandFailed(
        f"the budget of {checked.config.budget_hours:g} h ended before a trial of sweep {checked.name} did; rerun the "
        "same command with a larger --budget-hours, which resumes it"
    )


def _register(winner: Trial, children: Any) -> str:
    """Register the winner's model from the winner's own run, so that lineage leads to its dataset and commit."""
    assert winner.pretrain is not None
    config = winner.pretrain.config
    if not config.tracking.register:
        return ""
    publish = publisher(config, winner.manifest)
    return publish(children.find(winner), RunFolder(winner.pretrain.folder))["model"]


def _test(checked: _Sweep, winners: Sequence[Trial], stack: ExitStack) -> dict[str, list[float]]:
    """Return top-1 on test of the best point and of its baseline, by the classifiers that were measured on val.

    There is one value per seed, and none without a test split or if it shall stay unread. Test is read for no other
    point.
    """
    if not checked.config.read_test or "test" not in checked.manifest.splits:
        return {}
    labels = {field: winners[0].point[field] for field in LABEL_FIELDS if field in winners[0].point}
    baselines = [t for t in checked.trials if t.pretrain is None and t.point == labels and t.is_finished()]
    jobs: dict[str, list[IndexedJob]] = {}
    for trial in (*winners, *baselines):
        for measure in MEASURES:
            on_val: ClassifyJob = getattr(trial, measure)
            output = checked.storage.join(f"test/{trial.key}")
            job = dataclasses.replace(
                on_val,
                folder=open_storage(open_storage(output).join(measure)).uri,
                config=dataclasses.replace(on_val.config, eval_split="test", output=output),
            )
            name = measure if trial.pretrain else {"finetune": "scratch", "probe": "random"}[measure]
            jobs.setdefault(name, []).append((job, index_dataset(job, trial.manifest)))
            _copy_checkpoint(on_val, job)
    every = [indexed for some in jobs.values() for indexed in some]
    unread = [(job, dataset) for job, dataset in every if RunFolder(job.folder).read_result() is None]
    if unread:
        log.info("evaluating the best point on test")
        stack.enter_context(ray_session(winners[0].main.compute))
        launch(unread, f"{checked.name}-test")
    return {
        name: [(RunFolder(job.folder).read_result() or {})["top1"] for job, _ in some] for name, some in jobs.items()
    }


def _copy_checkpoint(source: ClassifyJob, target: ClassifyJob) -> None:
    """Copy the source's last checkpoint to the target, which then only has to evaluate."""
    trained, folder = RunFolder(source.folder).checkpoints.latest(), RunFolder(target.folder)
    if trained is not None and not folder.checkpoints.steps():
        folder.checkpoints.save(trained, Retention(newest=1))


def _write(checked: _Sweep, entries: list[Entry], best: Entry, tests: dict[str, list[float]]) -> dict[str, Any]:
    """Write preset and figure to the sweep's folder; return the result."""
    storage, config = checked.storage, checked.config
    point = next(measured for measured in measured_points(entries) if best in measured.entries)
    means = {name: round(statistics.fmean(values), 4) for name, values in tests.items()}
    on_test: dict[Measure, float | None] = {measure: means.get(measure) for measure in MEASURES}
    pretrain, _, _ = parts_at(config, best["point"])
    storage.write("best.yaml", preset_of(pretrain, checked.name, point, on_test))
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
        **{f"{measure}_val": round(point.of(measure).mean, 4) for measure in MEASURES},
        **{f"{measure}_test": on_test[measure] for measure in MEASURES},
        "scratch_test": means.get("scratch"),
        "tests": tests,
        "is_test_unread": not config.read_test and "test" in checked.manifest.splits,
        "trials": entries,
        "num_unrun": len(checked.trials) - len(entries),
        "budget_hours": config.budget_hours,
    }


def _log_result(parent: registry.Run, storage: Storage, result: dict[str, Any], charts: dict[str, bytes]) -> None:
    """Log table, summary, report, figures, preset and final numbers to the sweep's MLflow run."""
    storage.write("table.txt", result["text"].encode() + b"\n")
    with TemporaryDirectory(prefix="mae-sweep-") as scratch:
        (Path(scratch) / _SUMMARY).write_bytes(_json(result))
        names = ["table.txt", "best.yaml", "report.html", *(["masking_ratio.png"] if result["figure"] else [])]
        for name in names:
            (Path(scratch) / name).write_bytes(storage.read(name))
        for path in sorted(Path(scratch).iterdir()):
            parent.log_file(path)
        for name, content in charts.items():
            path = Path(scratch) / name
            path.write_bytes(content)
            parent.log_file(path, "charts")
    now_ms = int(time.time() * 1000)
    values = {f"{m}_top1": result[f"{m}_val"] for m in MEASURES}
    values |= {f"{m}_test_top1": result[f"{m}_test"] for m in (*MEASURES, "scratch")}
    parent.log_points([Point(key, value, 0, now_ms) for key, value in values.items() if value is not None])
    parent.set_tags({"mae.best": json.dumps(result["best"]), "mae.model": result["model"]})


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, indent=1).encode()
