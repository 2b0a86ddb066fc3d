"""A sweep for real: killed or stopped after its first trial and started again, it repeats nothing and ends well."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import sample
from pipelines.config import PretrainConfig, SweepConfig, load_preset, with_overrides
from pipelines.runs.metrics import Evaluations
from pipelines.storage import open_storage
from tests.waiting import JOB_DEADLINE_S, KILLED_DEADLINE_S, RUN_DEADLINE_S, wait_until
from tune.budget import Budget, Clock
from tune.planning import plan, settled
from tune.trial import Trial, grouped

MAE = [sys.executable, "-c", "from pipelines.cli import main; main()"]
SWEEP = [*MAE, "sweep", "--preset", "tiny.yaml"]
PRESET = {
    "kind": "sweep",
    "baselines": True,
    "space": {"model.mask.ratio": [0.5, 0.75]},
    "pretrain": {
        "epochs": 1,
        "data": {"uri": "prepared", "batch": 64, "micro_batch": 32},
        "model": {
            "arch": "vit_pico_patch4",
            "image_px": [28, 28],
            "channels": 1,
            "decoder_depth": 1,
            "decoder_width": 32,
            "decoder_heads": 4,
        },
        "optim": {"warmup_epochs": 0},
        "compute": {"data_tasks": 1},
        "tracking": {"log_every_steps": 1},
    },
    "probe": {
        "backbone": "random:vit_pico_patch4",
        "epochs": 2,
        "data": {"batch": 64, "micro_batch": 32},
        "classifier": {"method": "probe", "pool": "avg", "head_std": 0.01},
        "optim": {"name": "lars", "base_lr": 1.0, "warmup_epochs": 0, "weight_decay": 0},
        "augment": {"crop": "none", "flip": False},
    },
    "finetune": {
        "backbone": "random:vit_pico_patch4",
        "epochs": 1,
        "data": {"batch": 64, "micro_batch": 32},
        "classifier": {"method": "finetune", "pool": "avg"},
        "optim": {"warmup_epochs": 0},
    },
}
PRESET["scratch"] = PRESET["finetune"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 260 prepared images of the sample and the preset."""
    home = tmp_path_factory.mktemp("sweep")
    images = sample.unpack(home / "images")
    for split, count in (("train", 20), ("test", 6)):
        for folder in (images / split).iterdir():
            for path in sorted(folder.iterdir())[count:]:
                path.unlink()
    subprocess.run(
        [*MAE, "prepare", "images", "prepared"], cwd=home, env=environment(home), check=True, timeout=JOB_DEADLINE_S
    )
    shutil.rmtree(images)
    (home / "tiny.yaml").write_text(yaml.safe_dump(PRESET))
    return home


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}


def run(home: Path, *flags: str) -> dict[str, Any]:
    command = [*SWEEP, "--json", *flags]
    done = subprocess.run(
        command, cwd=home, env=environment(home), capture_output=True, text=True, timeout=RUN_DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ended_after_first_trial(home: Path, number: signal.Signals) -> tuple[Path, int, str]:
    """Send a signal to the sweep's driver after its first trial.

    Return the path of that trial's record, the driver's status, and what it said.
    """
    path = home / "ended.log"
    with path.open("wb") as log:
        driver = subprocess.Popen(SWEEP, cwd=home, env=environment(home), stdout=log, stderr=log)
    try:
        [entry] = wait_until(
            lambda: list(home.glob("runs/*/trials/*/trial.json")),
            lambda: f"the first trial's end: {path.read_text()}",
            RUN_DEADLINE_S,
            alive=lambda: driver.poll() is None,
            poll_every_s=0.1,
        )
        driver.send_signal(number)
        status = driver.wait(JOB_DEADLINE_S)
    finally:
        driver.kill()
        driver.wait(KILLED_DEADLINE_S)
    return entry, status, path.read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_sweep_repeats_no_finished_trial(home: Path) -> None:
    entry, _, _ = ended_after_first_trial(home, signal.SIGKILL)
    before, content = entry.stat().st_mtime_ns, entry.read_bytes()
    assert not json.loads(content)["error"]

    unread = run(home, "--no-read-test")
    assert (unread["tests"], unread["finetune_test"]) == ({}, None)
    printed = Path(unread["folder"]) / "table.txt"
    assert "test is unread; the same command with --read-test" in printed.read_text()
    result = run(home, "--read-test")
    only_tests = {"tests", "probe_test", "finetune_test", "scratch_test", "is_test_unread"}
    assert {key for key, value in result.items() if value != unread[key]} == only_tests
    assert "test is unread" not in printed.read_text()
    assert run(home, "--no-read-test") == result, "what was read stays read"
    assert (entry.stat().st_mtime_ns, entry.read_bytes()) == (before, content)
    assert json.loads(content) in result["trials"]
    *trials, scratch = result["trials"]
    assert [trial["point"]["model.mask.ratio"] for trial in trials] == [0.5, 0.75]
    assert [(trial["visible"], trial["patches"]) for trial in trials] == [(24, 49), (12, 49)]
    assert (scratch["kind"], scratch["point"], scratch["loss"]) == ("scratch", {}, None)
    assert result["tests"]["scratch"] == [result["scratch_test"]]
    best = max(trials, key=lambda trial: (trial["finetune"], trial["probe"]))
    assert result["best"] == best["point"]
    assert (best["probe"], best["finetune"]) == (result["probe_val"], result["finetune_val"])
    assert result["probe_test"] is not None
    assert result["finetune_test"] is not None
    assert Path(result["figure"]).stat().st_size > 10_000
    winner = load_preset(PretrainConfig, result["best_preset"])
    assert winner.model.mask.ratio == result["best"]["model.mask.ratio"]

    page = Path(result["report"]).read_text()
    assert page.count("<img") == 2 * 5 * (2 + len(trials))
    assert all(trial["key"] in page or f"{trial['finetune']:.2f}" in page for trial in result["trials"])

    again = run(home)
    assert again == result
    assert run(home, "--max-concurrent", "2") == result
    check_mlflow(home, result)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_stopped_sweep_says_how_many_trials_are_finished_and_the_same_command_finishes_it(
    home: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    shutil.copytree(home / "prepared", tmp_path / "prepared")
    shutil.copy(home / "tiny.yaml", tmp_path)
    entry, status, said = ended_after_first_trial(tmp_path, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, said
    name = entry.parents[2].name
    again = shlex.join(["mae", *SWEEP[len(MAE) :]])
    assert said.splitlines()[-1] == f"mae: {name} stopped with 1 of 2 trials finished; to resume: {again}"
    assert "Traceback" not in said
    content = entry.read_bytes()

    result = run(tmp_path)
    assert entry.read_bytes() == content
    assert json.loads(content) in result["trials"]
    assert len(result["trials"]) == 2
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(result["run_id"]).info.status == "FINISHED"


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_trial_below_those_before_it_is_stopped_early_and_its_point_gets_no_other_seed(
    home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "prepared", tmp_path / "prepared")
    preset = json.loads(json.dumps(PRESET))
    preset |= {"space": {"model.arch": ["vit_pico_patch14", "vit_pico_patch4"]}, "seeds": 2, "baselines": False}
    preset |= {"early_stop": "asha", "asha_factor": 2}
    preset["pretrain"] |= {"epochs": 120, "evaluate": {"every_epochs": 2, "images": 180}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(preset))
    result = run(tmp_path)
    first, second = (entry for entry in result["trials"] if entry["seed"] == 0)
    at_rung = []
    for entry in (first, second):
        folder = open_storage(tmp_path / "runs" / result["run"] / "trials" / entry["key"] / "pretrain")
        found = Evaluations(folder)
        at_rung.append(found.read(found.steps()[0])["evaluate/linear_top1"])
    assert "stopped" not in first, "there was none before it"
    is_worse = at_rung[1] < at_rung[0]
    assert ("stopped" in second) == is_worse
    assert (second["finetune"] is None) == is_worse
    assert [entry["point"] for entry in result["trials"] if entry["seed"] == 1] == [
        entry["point"] for entry in (first, second) if "stopped" not in entry
    ]
    assert run(tmp_path) == result


def check_mlflow(home: Path, result: dict[str, Any]) -> None:
    """One parent, a finished child a trial with both numbers, and one version, made by the winner's run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name == "mae"]
    runs = client.search_runs([experiment])
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]}
    assert len(runs) == 1 + len(result["trials"]) == 1 + len(children)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for trial in result["trials"]:
        child = children[f"{result['run']}/{trial['key']}"]
        assert child.data.metrics["probe_top1"] == trial["probe"]
        assert child.data.metrics["finetune_top1"] == trial["finetune"]
        is_scratch = trial["kind"] == "scratch"
        steps = {"probe/train/loss", "finetune/train/loss"} | (set() if is_scratch else {"train/loss"})
        assert steps <= child.data.metrics.keys()
        assert child.data.params.get("model.mask.ratio", "") == str(trial["point"].get("model.mask.ratio", ""))
    [version] = client.search_model_versions("name = 'mae-vit_pico_patch4'")
    assert version.run_id == children[f"{result['run']}/{result['best_key']}"].info.run_id
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert {"best.yaml", "charts", "masking_ratio.png", "report.html", "summary.json", "table.txt"} <= names
    charts = {Path(file.path).name for file in client.list_artifacts(result["run_id"], "charts")}
    assert {"curves-finetune.png", "curves-finetune.svg", "cost.svg"} <= charts


@pytest.fixture(scope="module")
def config(home: Path) -> SweepConfig:
    """Return the preset's sweep over the prepared images."""
    values = {f"{part}.data.uri": str(home / "prepared") for part in ("pretrain", "probe", "finetune")}
    return settled(with_overrides(load_preset(SweepConfig, str(home / "tiny.yaml")), values))[0]


def plan_of(config: SweepConfig, folder: Path, **changes: Any) -> list[Trial]:
    return plan(dataclasses.replace(config, **changes), open_storage(folder))


@pytest.mark.ray
@pytest.mark.slow
def test_all_points_and_the_baseline_come_with_one_seed_before_the_next(config: SweepConfig, tmp_path: Path) -> None:
    trials = plan_of(config, tmp_path, seeds=2)
    assert [(trial.seed, trial.describe()) for trial in trials] == [
        (0, "model.mask.ratio=0.5"),
        (0, "model.mask.ratio=0.75"),
        (0, "from scratch"),
        (1, "model.mask.ratio=0.5, seed 1"),
        (1, "model.mask.ratio=0.75, seed 1"),
        (1, "from scratch, seed 1"),
    ]
    assert [job.config.seed for job in trials[3].jobs.values()] == [1, 1, 1]
    assert [trial.key for trial in trials[:3]] == [trial.key for trial in plan_of(config, tmp_path)]
    assert len({trial.key for trial in trials}) == 6


@pytest.mark.ray
@pytest.mark.slow
def test_points_that_pretrain_alike_share_the_pretraining_and_run_together(config: SweepConfig, tmp_path: Path) -> None:
    space = {"model.mask.ratio": [0.5, 0.75], "finetune.labels": ["10%", "50%"]}
    trials = plan_of(config, tmp_path, space=space)
    *points, few, many = trials
    folders = [trial.jobs["pretrain"].folder for trial in points]
    assert (folders[0], folders[2]) == (folders[1], folders[3])
    assert folders[0] != folders[2]
    assert points[0].probe.folder == points[1].probe.folder
    assert len({trial.finetune.folder for trial in points}) == 4
    assert [trial.point for trial in (few, many)] == [{"finetune.labels": "10%"}, {"finetune.labels": "50%"}]
    assert [trial.finetune.config.labels for trial in (few, many)] == ["10%", "50%"]
    groups = grouped(trials, 1)
    assert [[trial.key for trial in group] for group in groups] == [
        [trial.key for trial in group] for group in (points[:2], points[2:], [few], [many])
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_baselines_join_a_full_group_and_the_first_one_is_smaller(config: SweepConfig, tmp_path: Path) -> None:
    trials = plan_of(config, tmp_path, seeds=3)
    for per_group, sizes in ((1, [1] * 9), (2, [1, 2, 2, 2, 2]), (4, [1, 4, 4]), (5, [4, 5]), (9, [9])):
        groups = grouped(trials, per_group)
        assert [len(group) for group in groups] == sizes
        assert [trial.key for group in groups for trial in group] == [trial.key for trial in trials]


@pytest.mark.ray
@pytest.mark.slow
def test_a_budget_covers_what_the_ledger_says_will_fit(config: SweepConfig, tmp_path: Path) -> None:
    trials = plan_of(config, tmp_path, seeds=2)
    low, high, scratch, low_again, high_again, _ = trials
    assert Budget.of(trials, 1).covers([low]), "nothing is known yet"
    low.record("it failed", wall_s=100.0)
    high.record("it failed", wall_s=300.0)
    assert Budget.of(trials, 150).covers([low_again])
    assert not Budget.of(trials, 150).covers([high_again])
    assert not Budget.of(trials, 150).covers([low_again, low_again])
    assert Budget.of(trials, 250).covers([scratch]), "unknown trials take the mean"
    assert not Budget.of(trials, 150).covers([scratch])


def test_a_clock_adds_up_over_starts(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("spent.json", b'{"wall_s": 100.0}')
    clock = Clock(storage)
    assert 100 <= clock.spent_s() < 160
    clock.save()
    assert Clock(storage).spent_s() >= 100
