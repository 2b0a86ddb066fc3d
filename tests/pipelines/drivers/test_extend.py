"""What an extension takes from a run, what it may change, and what is refused before anything is written."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_core.config import ModelConfig, OptimConfig
from mae_core.errors import UserError
from pipelines.cli import parse
from pipelines.config import (
    ComputeConfig,
    DataConfig,
    PretrainConfig,
    TrackingConfig,
    to_dict,
)
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.extend import command_of, extension_name, extension_of, read_finished_run
from pipelines.machine import Machine
from pipelines.runs.automatic import choose
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Extended, PretrainJob
from pipelines.runs.listing import list_runs, table
from pipelines.runs.plans import index_dataset, segments, train_plan
from tests.finished import finished_run
from tests.new_mlflow import new_mlflow

TINY = ModelConfig(
    arch="vit_pico_patch4", image_px=(8, 8), channels=3, decoder_depth=1, decoder_width=32, decoder_heads=2
)


def tiny(tmp_path: Path, uri: str, **changes: Any) -> PretrainConfig:
    config = PretrainConfig(
        name="first",
        output=str(tmp_path / "runs"),
        epochs=10,
        data=DataConfig(uri=uri, batch=16, micro_batch=8),
        model=TINY,
        optim=OptimConfig(base_lr=1e-2, warmup_epochs=2.0, min_lr=1e-5),
        compute=ComputeConfig(num_workers=2),
        tracking=TrackingConfig(register=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its schema costs seconds."""
    return new_mlflow(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def finished(
    tmp_path: Path, tiles: tuple[str, Manifest], mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """Return a run `runs/first` of ten epochs in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    return finished_run(tiny(tmp_path, tiles[0]), tiles[1])


def refusal(config: PretrainConfig) -> str:
    """Return the message of the error that keeps the run from being started; nothing of it may be written."""
    from pipelines.drivers.pretrain import pretrain

    before = {str(path) for path in Path(config.output).rglob("*")}
    with pytest.raises(UserError) as caught:
        pretrain(config, fresh=True)
    assert {str(path) for path in Path(config.output).rglob("*")} == before
    return str(caught.value)


def test_an_extension_has_the_runs_config_but_for_what_is_stated(finished: RunFolder, tmp_path: Path) -> None:
    ours = json.loads(finished.storage.read("config.json"))
    for run in (finished.storage.uri, "runs/first", "first"):
        config = extension_of(run, {"epochs": 5, "compute.num_workers": 1}, output="runs")
        assert config.extend == finished.storage.uri
        assert config.output == str(tmp_path / "runs")
        assert (config.name, config.epochs, config.compute.num_workers) == ("", 5, 1)
        assert config.optim.warmup_epochs == 1.0, "the warm-up keeps its share of the epochs"
        assert to_dict(config.model) == ours["model"]
        assert to_dict(config.data) == ours["data"]


def test_the_command_line_states_fields_over_those_of_the_run(finished: RunFolder, tmp_path: Path) -> None:
    # 8 is no multiple of the default micro-batch of 64, only of the run's.
    words = ["pretrain", "--extend", "first", "--epochs=5", "--data.batch", "8", "--optim.schedule", "constant"]
    config = parse(words).config
    stated = {"epochs": 5, "data.batch": 8, "optim.schedule": "constant"}
    assert config == extension_of("runs/first", stated)
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump({"kind": "pretrain", "extend": "first", "epochs": 7, "data": {"batch": 8}}))
    assert parse(["pretrain", "--preset", str(preset)]).config == extension_of("first", {"epochs": 7, "data.batch": 8})
    assert parse(["config", "pretrain", "--preset", str(preset), "--epochs", "5"]).config.epochs == 5


def test_an_extension_takes_over_what_was_stated_and_not_what_auto_chose(
    tmp_path: Path, tiles: tuple[str, Manifest]
) -> None:
    machines = [Machine(num_cores=2), Machine(num_cores=16, num_gpus=2, gpu="H100", has_bfloat16=True)]
    config = tiny(tmp_path, tiles[0], compute=ComputeConfig(data_tasks=3))
    names = set()
    for number, machine in enumerate(machines):
        there = dataclasses.replace(config, output=str(tmp_path / str(number)))
        run = finished_run(there, tiles[1], chosen=choose(there, machine))
        assert json.loads(run.storage.read("chosen.json"))["precision"] == ("float32", "bfloat16")[number]
        extension = extension_of(run.storage.uri, {"epochs": 5})
        assert extension.compute == config.compute
        extended = dataclasses.replace(read_finished_run(run.storage.uri, there.output), id="one id")
        names.add(extension_name(extension, extended))
        assert command_of(extension).endswith("--epochs=5"), "no option states what auto chose"
    assert len(names) == 1


@pytest.mark.parametrize(
    "compute", [{}, {"gpu": True, "compile": False}, {"gpu": False, "precision": "bfloat16", "micro_batch": 4}]
)
def test_the_command_that_finishes_a_run_has_the_compute_options_that_were_stated(
    tmp_path: Path, tiles: tuple[str, Manifest], compute: dict[str, Any]
) -> None:
    config = tiny(tmp_path, tiles[0], compute=ComputeConfig(**compute))
    assert parse(shlex.split(command_of(config))[1:]).config == config
    finished_run(config, tiles[1])
    # Of a run that states what auto may be, an extension may go back to auto.
    extension = extension_of(str(tmp_path / "runs/first"), {"epochs": 5})
    back = dataclasses.replace(extension, compute=ComputeConfig())
    assert parse(shlex.split(command_of(back))[1:]).config == back


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extend", "first"], "extending first needs --epochs, those to train after the run's end; try --epochs 100"),
        (["--extend", "first", "--epochs", "0"], "epochs 0 is below 1; try 1"),
        (["--extend", "first", "--epochs", "-3"], "epochs -3 is below 1; try 1"),
        (["--extend", "frist", "--epochs", "3"], "'frist' is neither the folder of a pretraining run nor the name"),
        (["--extend", "first", "--epochs", "3", "--model", "models:/x/1"], "exclude each other"),
        (["--extend"], "--extend needs a value"),
        (
            ["--extend", "first", "--epochs", "9", "--optim.schedule", "constant", "--optim.decay-share", "0.9"],
            "overlap in 9 epochs; try --optim.decay-share 0.8",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused_on_the_command_line(
    finished: RunFolder, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        parse(["pretrain", *words])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.decoder_width": 64}, "model.decoder_width of run first is 32, and 64 would not continue it"),
        ({"model.mask.ratio": 0.5}, "model.mask.ratio of run first is 0.75"),
        ({"optim.name": "lars"}, "optim.name of run first is adamw"),
        ({"masks_per_image": 2, "epochs": 4}, "masks_per_image of run first is 1"),
        ({"name": "first"}, "name 'first' puts the extension into the folder of the run that it extends"),
        ({"name": "first/more"}, "name 'first/more' puts the extension into the folder of the run"),
    ],
)
def test_an_extension_of_another_model_is_refused(finished: RunFolder, change: dict[str, Any], said: str) -> None:
    message = refusal(extension_of("first", {"epochs": 5, **change}))
    assert said in message
    assert "; leave it out, or try --model models:/NAME@ALIAS" in message or "try another" in message
    assert finished.read_outcome() is not None


def test_an_extension_on_other_images_is_refused(
    finished: RunFolder, tiles: tuple[str, Manifest], tmp_path: Path
) -> None:
    from pipelines.dataset.manifest import write_manifest
    from pipelines.storage import open_storage

    write_manifest(open_storage(tiles[0]), dataclasses.replace(tiles[1], classes=["cat", "dog"]))
    message = refusal(extension_of("first", {"epochs": 5}))
    assert f"but run first was trained on {tiles[1].digest[:12]}" in message
    assert "try --model models:/NAME@ALIAS to start a run from its weights on other images" in message


def test_a_run_without_its_last_checkpoint_is_refused(finished: RunFolder) -> None:
    finished.checkpoints.discard(30)
    message = refusal(extension_of("first", {"epochs": 5}))
    assert "has lost the checkpoint of its last step 30 (it has none); try --model" in message


def test_a_version_that_this_mlflow_lacks_is_refused(
    tmp_path: Path, tiles: tuple[str, Manifest], finished: Any
) -> None:
    finished_run(tiny(tmp_path, tiles[0], name="registered"), tiles[1], model="models:/mae-elsewhere/3")
    message = refusal(extension_of("registered", {"epochs": 5}))
    assert "no registered model 'mae-elsewhere'" in message
    assert "set MLFLOW_TRACKING_URI to the MLflow that has the run" in message


def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(finished: RunFolder) -> None:
    finished.storage.delete("outcome.json")
    with pytest.raises(UserError) as caught:
        extension_of("first", {"epochs": 5})
    said, command = str(caught.value).split("; finish it first: ")
    assert said.startswith(f"run {finished.storage.uri} is not finished (trained, step 0, checkpoint 30")
    config = json.loads(finished.storage.read("config.json"))
    assert to_dict(parse(shlex.split(command)[1:]).config) == config


def test_the_command_of_an_extension_is_found_again(finished: RunFolder) -> None:
    config = extension_of("first", {"epochs": 5, "name": "second", "optim.base_lr": 1e-3, "augment.flip": False})
    command = command_of(config)
    assert command.startswith(f"mae pretrain --extend={finished.storage.uri} --epochs=5 ")
    assert parse(shlex.split(command)[1:]).config == config


def test_an_extension_is_named_after_the_run_and_another_run_makes_another_name(
    finished: RunFolder, tmp_path: Path, tiles: tuple[str, Manifest]
) -> None:
    def name_for(run: str, **changes: Any) -> str:
        config = extension_of(run, {"epochs": 5, **changes})
        return extension_name(config, read_finished_run(run, "runs"))

    name = name_for("first")
    assert name.startswith("first-")
    assert len(name) == len("first-") + 12
    assert name_for("first", **{"output": "elsewhere", "compute.num_workers": 1}) == name
    assert name_for("first", seed=1) != name
    finished.clear()
    finished_run(tiny(tmp_path, tiles[0]), tiles[1])
    assert name_for("first") != name, "the same config trained anew is another run"
    finished_run(tiny(tmp_path, tiles[0], name=name), tiles[1])
    again = name_for(name)
    assert again.startswith("first-")
    assert len(again) == len(name), "names of extensions of extensions do not grow"


@pytest.mark.parametrize("views", [1, 2])
def test_an_extension_uses_the_epochs_that_follow(
    finished: RunFolder, tmp_path: Path, tiles: tuple[str, Manifest], views: int
) -> None:
    """Order, crops and masks are keyed by the epoch, so none of those of the run is used again."""
    uri, manifest = tiles
    run = finished_run(
        tiny(tmp_path, uri, name="v", masks_per_image=views), manifest, steps_per_epoch={1: 3, 2: 5}[views]
    )
    for count, batch in ((1, 16), (2, 8)):
        config = extension_of(run.storage.uri, {"epochs": 4, "name": f"v{count}", "data.batch": batch})
        extended = read_finished_run(run.storage.uri, "runs").extended()
        job = PretrainJob(folder=str(tmp_path / "j"), config=config, pixels=read_finished_run("v", "runs").pixels)
        plain = dataclasses.replace(job, config=dataclasses.replace(config, epochs=14, extend=""))
        job = dataclasses.replace(job, extended=extended)
        dataset = index_dataset(job, manifest)
        steps = train_plan(job, dataset).steps_per_epoch
        first = 10 // views * steps
        (segment,) = segments(job, dataset, first)
        (whole,) = segments(plain, dataset, first)
        assert (
            (segment.first_step, segment.last_step)
            == (whole.first_step, whole.last_step)
            == (first, 14 // views * steps)
        )
        ids = [segment.plan.step_ids(step).tolist() for step in range(first, segment.last_step)]
        assert ids == [whole.plan.step_ids(step).tolist() for step in range(first, whole.last_step)]


def test_an_extension_can_be_extended_and_counts_all_epochs_before_it(
    finished: RunFolder, tmp_path: Path, tiles: tuple[str, Manifest]
) -> None:
    first = read_finished_run("first", "runs")
    assert first.extended() == Extended(run=first.id, epochs=10, end_lr=1e-5)
    config = extension_of(
        "first", {"epochs": 5, "name": "second", "optim.schedule": "constant", "optim.decay_share": 0}
    )
    finished_run(config, tiles[1], extended=first.extended())
    second = read_finished_run("second", "runs")
    assert (second.extended().run, second.extended().epochs) == (second.id, 15)
    assert second.extended().end_lr == pytest.approx(1e-2 * 16 / 256)
    assert extension_of("second", {"epochs": 10}).optim.warmup_epochs == 2.0


def test_more_epochs_under_the_same_name_are_refused_with_the_command_that_adds_them(
    finished: RunFolder, tmp_path: Path, tiles: tuple[str, Manifest]
) -> None:
    with pytest.raises(UserError, match=r"another config\.epochs \(10 there, 12 here\)") as caught:
        finished_run(tiny(tmp_path, tiles[0], epochs=12), tiles[1])
    assert str(caught.value).endswith(f"`mae pretrain --extend {finished.storage.uri} --epochs N`")


def test_the_listing_names_the_run_that_is_extended(finished: RunFolder, tiles: tuple[str, Manifest]) -> None:
    from pipelines.runs.metrics import MetricSpool

    first = read_finished_run("first", "runs")
    config = extension_of("first", {"epochs": 5, "name": "second"})
    spool = MetricSpool(finished_run(config, tiles[1], extended=first.extended()).storage)
    spool.add(36, {"train/loss": 0.25, "epoch": 12.0})
    spool.close()
    runs = list_runs("runs")
    assert [(run.run, run.extends, run.total_steps) for run in runs] == [("first", "", None), ("second", "first", 45)]
    assert table(runs).endswith("finished, step 36 of 45, checkpoint 45, loss 0.2500, extends first")
