"""handoff.yaml is refused in words, and a training's words give exactly the config that its name stands for."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mae_core.errors import UserError
from pipelines.cli import parse
from pipelines.config import PRESETS, ClassifyConfig, HandoffJob, load_preset
from pipelines.dataset.manifest import Manifest
from pipelines.handoff.jobs_file import config_of, read_plan, training_of, words_of
from pipelines.registry import ModelRef

Tiles = tuple[str, Manifest]
JOB = {"name": "tiles", "model": "mae-vit", "options": {"epochs": 12}}


def ref(version: int = 7, name: str = "mae-vit") -> ModelRef:
    return ModelRef(name=name, version=version, run_id="", model_id="", sha256={}, tags={})


def write(folder: Path, **values: object) -> str:
    (folder / "handoff.yaml").write_text(yaml.safe_dump({"output": "runs", "jobs": [JOB], **values}))
    return str(folder / "handoff.yaml")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"jobs": []}, "there are no jobs; list at least one"),
        ({"jobs": "tiles"}, "has no list `jobs`; write one as docs/handoff.md shows"),
        ({"jobs": [JOB, JOB]}, "job tiles is listed twice"),
        ({"jobs": [JOB | {"modle": "x"}]}, "unknown key modle; did you mean model"),
        ({"jobs": [{"name": "tiles"}]}, "has no name and model"),
        ({"jobs": [JOB | {"name": "Tiles/1"}]}, "job name 'Tiles/1' is not of letters"),
        ({"jobs": [JOB | {"model": "models:/mae@champion"}]}, "is no registered name"),
        ({"jobs": [JOB | {"options": {"backbone": "x"}}]}, "sets backbone, which the hand-over decides"),
        ({"jobs": [JOB | {"options": {"epoch": 3}}]}, "job tiles: unknown key epoch; did you mean epochs"),
        ({"jobs": [JOB | {"preset": "vit_bse"}]}, "job tiles: no preset 'vit_bse'; did you mean vit_base"),
        ({"jobs": [JOB | {"command": "probe", "preset": "nano_finetune"}]}, "but classifier.method finetune"),
        ({"max_runing": 2}, "unknown key max_runing; did you mean max_running"),
        ({"max_running": 0}, "max_running 0 is below 1"),
        ({"output": ""}, "output is empty; try s3://bucket/runs"),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(values: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_plan(write(tmp_path, **values))
    assert words in str(caught.value)


def test_an_absent_file_and_one_that_is_no_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*handoff.yaml; write one"):
        read_plan(str(tmp_path / "handoff.yaml"))
    (tmp_path / "handoff.yaml").write_text("jobs: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_plan(str(tmp_path / "handoff.yaml"))


def test_a_preset_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: classify\nepochs: 9\n")
    (job,) = read_plan(write(tmp_path, jobs=[JOB | {"preset": "mine.yaml", "options": {}}])).jobs
    assert config_of(job).epochs == 9


@pytest.mark.parametrize(
    ("command", "preset"),
    [("finetune", ""), ("probe", "")]
    + [
        (load_preset(ClassifyConfig, path.stem).classifier.command, path.stem)
        for path in sorted(PRESETS.glob("*.yaml"))
        if "kind: classify" in path.read_text()
    ],
)
def test_the_words_of_a_job_give_its_config(command: str, preset: str) -> None:
    # Fewer epochs than the default's warm-up, which a command line would scale.
    options = {"epochs": 12, "optim.warmup_epochs": 10.0, "data.uri": "s3://b/d", "tracking.name": "mine"}
    if preset == "":
        options |= {"image_px": [32, 48], "augment.flip": False}
    config = config_of(HandoffJob(name="a", model="m", command=command, preset=preset, options=options))  # pyright: ignore[reportArgumentType]
    config = dataclasses.replace(config, backbone="models:/mae/7", name="a-v7-0123")
    call = parse([command, *words_of(config, command)])
    assert (call.command, call.config) == (command, config)


def test_a_trainings_name_follows_from_version_dataset_and_config(tiles: Tiles, tmp_path: Path) -> None:
    options = {"data.uri": tiles[0], "epochs": 12, "data.batch": 64}
    job = HandoffJob(name="tiles", model="mae-vit", options=options)
    training = training_of(job, str(tmp_path), ref())
    assert training == training_of(job, str(tmp_path), ref())
    assert training.name == f"tiles-v7-{training.digest}"
    call = parse(list(training.words))
    assert (call.config.name, call.config.backbone) == (training.name, "models:/mae-vit/7")
    assert call.config.tracking.tag_values == {"handoff.job": "tiles", "handoff.config": training.digest}
    assert training_of(dataclasses.replace(job, options=options | {"epochs": 14}), "x", ref()).name != training.name
    assert training_of(job, "x", ref(8)).name.startswith("tiles-v8-")
    assert training_of(job, "x", ref(7, "other")).digest != training.digest
    # What does not decide the result may change: the training was had.
    same = dataclasses.replace(job, options=options | {"compute.num_workers": 2})
    assert training_of(same, "elsewhere", ref()).name == training.name


def test_a_dataset_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    job = HandoffJob(name="tiles", model="mae-vit", options={"data.uri": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="nothing"):
        training_of(job, str(tmp_path), ref())
