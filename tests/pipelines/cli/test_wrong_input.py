"""What a user gets wrong ends with status 2 and one sentence of value, limit and remedy; nothing is half-written.

No Ray is started: all of it is noticed before there would be work for it (`prepare` runs its slices in this process).
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cli, prepare
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import read_manifest, write_manifest
from pipelines.storage import open_storage
from tests.new_mlflow import new_mlflow

NOBODY = 65534
SMALL = ["--model.arch", "vit_pico_patch7", "--model.image-px", "28", "28", "--model.channels", "1"]


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its schema costs seconds."""
    return new_mlflow(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def place(tmp_path: Path, mlflow_uri: str, without_ray: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to run commands in; Ray tasks of `prepare` run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    return tmp_path


def images(folder: Path, *names: str, offset: int = 0) -> Path:
    """One gray image a name, no two alike."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i + offset).integers(0, 256, (28, 28)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def labelled(place: Path) -> str:
    names = [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in ("cat", "dog") for i in range(3)]
    prepare.prepare(str(images(place / "images", *names)), str(place / "data"), PrepareConfig())
    return str(place / "data")


def unlabelled(place: Path) -> str:
    prepare.prepare(
        str(images(place / "images", *(f"{i}.png" for i in range(6)))), str(place / "data"), PrepareConfig()
    )
    return str(place / "data")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(place: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail; return its message of one line. Nothing in its folder may change."""
    before = contents(place)
    capsys.readouterr()
    status = cli.run(list(argv))
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("mae: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert contents(place) == before
    return captured.err.removeprefix("mae: ").strip()


Says = tuple[str, ...]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["pretrian"], ("'pretrian'", "did you mean pretrain?")),
        (["--epochs", "3", "pretrain"], ("--epochs", "before the command", "try `mae pretrain --epochs ...`")),
        (["pretrain", "--data.bacth", "3"], ("--data.bacth", "did you mean --data.batch?")),
        (["pretrain", "--preset", "vit_bas"], ("'vit_bas'", "did you mean vit_base?")),
        (["pretrain", "--epochs", "many"], ("'many'", "--epochs", "--help")),
        (["pretrain", "--epochs"], ("--epochs", "--help")),
        (["pretrain", "--data.batch", "33"], ("33", "micro_batch 64", "try 64")),
        (["pretrain", "--model.image-px", "230", "224"], ("230px", "patch 16px", "try 224px")),
        (["pretrain", "--model.mask.ratio", "1"], ("1.0", "(0, 1)", "try 0.75")),
        (["pretrain", "--model.mask.ratio", "0"], ("0.0", "(0, 1)", "try 0.75")),
        (["pretrain", *SMALL, "--model.mask.ratio", "0.99"], ("0.99", "16 patches", "try 0.93")),
        (["pretrain", "--model.mask.kind", "grid", "--model.mask.ratio", "0.6"], ("0.6", "try 0.75")),
        (["pretrain", "--model.arch", "resnet50"], ("'resnet50'", "try vit_")),
        (["pretrain", "--optim.base-lr", "0"], ("base_lr 0.0", "try 1.5e-4")),
        (["pretrain"], ("no dataset", "try --data.uri")),
        (["pretrain", *SMALL, "--model.mask.ratio", "1e-17"], ("1e-17", "hides none of 16", "try 0.75")),
        (["pretrain", "--model.decoder-heads", "0"], ("heads 0", "try 16")),
        (["pretrain", "--optim.betas", "1.5", "0.9"], ("1.5", "[0, 1)", "try 0.9 0.95")),
        (["pretrain", "--optim.base-lr", "nan"], ("nan", "try 1.5e-4")),
        (["pretrain", "--optim.clip-norm", "-1"], ("-1", "try 1.0")),
        (["pretrain", "--data.window", "0"], ("window 0", "try 8192")),
        (["pretrain", "--tracking.log-every-steps", "0"], ("log_every_steps 0", "try 10")),
        (["pretrain", "--tracking.name", "a/b"], ("'a/b'", "MLflow refuses")),
        (["finetune", "--augment.rand-augment", "foo"], ("'foo'", "try rand-m9")),
        (["finetune", "--augment.mixup", "-1"], ("mixup -1", "try 0.8")),
        (["finetune", "--image-px", "0", "0"], ("0 x 0", "try 224 224")),
        (["sweep", "--space", "model.mask.ratio=["], ("'['", "try model.mask.ratio=0.5,0.75")),
        (["prepare", "--val-fraction", "0.2"], ("missing SOURCE", "usage: mae prepare SOURCE OUT")),
        (["prepare", "a", "b", "c"], ("unexpected 'c'", "usage: mae prepare SOURCE OUT")),
        (["prepare", "a", "b", "--fresh"], ("unknown option --fresh",)),
        (["reconstruct"], ("no images", "try --uri")),
        (["reconstruct", "--out", "x.foo"], ("'x.foo'", "try reconstructions.png")),
        (["finetune", "--backbone", "runs/x"], ("'runs/x'", "try models:/")),
        (["finetune", "--preset", "vit_base_probe"], ("'probe'", "try `mae probe`")),
        (["sweep", "--space", "ratio"], ("'ratio'", "try model.mask.ratio=0.5,0.75")),
        (["config", "prepare"], ("'prepare'", "try one of pretrain")),
        (["prepare", "images"], ("missing OUT", "usage: mae prepare SOURCE OUT")),
        (["register", "run@last"], ("'last'", "try RUN@STEP")),
        (["register", "run"], ("run", "try the folder that `mae pretrain` printed")),
    ],
)
def test_a_command_line_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: Says
) -> None:
    said = refusal(place, capsys, *argv)
    assert all(part in said for part in says), said


def test_an_unknown_key_of_a_preset_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text("kind: pretrain\nmodel: {mask: {ration: 0.5}}\n")
    said = refusal(place, capsys, "pretrain", "--preset", "mine.yaml")
    assert said == "unknown key model.mask.ration; did you mean model.mask.ratio?"


def test_a_folder_that_is_absent_empty_or_without_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent does not exist; give a folder of images, tar or Parquet files" in refusal(
        place, capsys, "prepare", "absent", "out"
    )
    (place / "empty").mkdir()
    assert "no image in" in refusal(place, capsys, "prepare", "empty", "out")
    (place / "empty" / "notes.txt").write_text("no image")
    assert "give a folder that has files ending in .jpg" in refusal(place, capsys, "prepare", "empty", "out")
    assert not (place / "out").exists()


def test_a_folder_with_no_readable_image(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images").mkdir()
    for i in range(3):
        (place / "images" / f"{i}.png").write_bytes(b"no image")
    said = refusal(place, capsys, "prepare", "images", "out")
    assert said.startswith("no readable image among the 3 files of")
    assert "such as " in said
    assert said.endswith(".png (not a known image format)")


def test_an_output_folder_that_holds_something_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(place)
    images(place / "others", *(f"{i}.png" for i in range(4)), offset=100)
    said = refusal(place, capsys, "prepare", "others", "data")
    assert "holds a dataset of another source" in said
    assert said.endswith("choose another folder, or empty it")
    said = refusal(place, capsys, "prepare", "images", "data", "--val-fraction", "0.5")
    assert "holds a dataset of another config" in said
    assert "is not empty and holds no prepared dataset" in refusal(place, capsys, "prepare", "others", "images")
    (place / "file").write_text("")
    assert "a file stands where a folder should" in refusal(place, capsys, "prepare", "others", "file/out")


@pytest.mark.slow
def test_a_dataset_that_is_not_prepared_or_damaged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(place / "others", "a.png")
    said = refusal(place, capsys, "pretrain", "--data.uri", "others")
    assert "is not a prepared dataset" in said
    assert "run `mae prepare others FOLDER` and train on FOLDER, or add --data.cache FOLDER" in said
    labelled(place)
    (place / "data" / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refusal(place, capsys, "pretrain", "--data.uri", "data", *SMALL)


def test_more_channels_than_the_model_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")
    prepare.prepare(str(place / "images"), str(place / "data"), PrepareConfig())
    said = refusal(place, capsys, "pretrain", "--data.uri", "data", *SMALL)
    assert "has 3 channels but model.channels is 1; try --model.channels 3" in said


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_labels_that_are_not_there(place: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    argv = [command, "--data.uri", unlabelled(place), "--backbone", "random:vit_pico_patch7"]
    said = refusal(place, capsys, *argv)
    assert "is unlabelled, but a classifier needs labels; prepare its source into another folder with --labels" in said
    manifest = read_manifest(open_storage(place / "data"))
    write_manifest(open_storage(place / "data"), manifest.noting({}, ["column:fine_label", "column:coarse_label"]))
    said = refusal(place, capsys, *argv)
    assert said.endswith("with --labels column:fine_label or --labels column:coarse_label")


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_one_class_is_nothing_to_learn(place: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    images(place / "images", *(f"cat/{i}.png" for i in range(6)))
    prepare.prepare(str(place / "images"), str(place / "data"), PrepareConfig(labels="folder", val_fraction=0.3))
    said = refusal(place, capsys, command, "--data.uri", str(place / "data"), "--backbone", "random:vit_pico_patch7")
    assert "has one class, cat: any classifier would be right on every image; prepare a source" in said


def test_a_split_without_labels_is_not_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*(f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(2)), "test/x.png"]
    images(place / "images", *names)
    prepare.prepare(str(place / "images"), str(place / "data"), PrepareConfig(labels="folder"))
    argv = ["--data.uri", str(place / "data"), "--backbone", "random:vit_pico_patch7", "--eval-split", "test"]
    said = refusal(place, capsys, "probe", *argv)
    assert said.endswith(
        "the 1 images of split 'test' of " + str(place / "data") + " are unlabelled; try --eval-split val"
    )


def test_no_split_to_evaluate_on_comes_with_a_way_to_make_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(place / "images", *(f"{c}/{i}.png" for c in "ab" for i in range(5)))
    prepare.prepare(str(place / "images"), str(place / "data"), PrepareConfig(val_fraction=0))
    said = refusal(place, capsys, "probe", "--data.uri", str(place / "data"), "--backbone", "random:vit_pico_patch7")
    assert (
        "has no split 'val' to evaluate on; prepare its source into another folder with --hold-out stratified" in said
    )
    prepare.prepare(str(place / "images"), str(place / "held"), PrepareConfig(hold_out="stratified"))
    assert set(read_manifest(open_storage(place / "held")).splits) == {"train", "val"}


def test_more_labels_than_there_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data.uri", labelled(place), "--backbone", "random:vit_pico_patch7", "--data.labels-per-class", "9"]
    said = refusal(place, capsys, "finetune", *argv)
    assert said == "labels_per_class 9 exceeds the 3 images of the smallest class; try 3"


def test_a_split_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data.uri", labelled(place), "--backbone", "random:vit_pico_patch7", "--eval-split", "test"]
    assert "has no split 'test' to evaluate on; try --eval-split val" in refusal(place, capsys, "finetune", *argv)


def test_a_backbone_that_the_images_do_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data.uri", labelled(place), "--backbone", "random:vit_pico_patch16"]
    said = refusal(place, capsys, "finetune", *argv)
    assert said == "image side 28px is not a multiple of patch 16px; try 32px"


@pytest.mark.slow
def test_a_model_or_alias_that_does_not_exist(place: Path, mlflow_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    uri = labelled(place)
    argv = ["finetune", "--data.uri", uri, "--backbone"]
    said = refusal(place, capsys, *argv, "models:/mae-vit_pico_patch7@candidate")
    assert "no registered model 'mae-vit_pico_patch7'" in said
    assert said.endswith("run `mae pretrain` first")
    MlflowClient(mlflow_uri, mlflow_uri).create_registered_model("mae-vit_pico_patch7")
    said = refusal(place, capsys, *argv, "models:/mae-vit_picco_patch7@candidate")
    assert said.endswith("did you mean mae-vit_pico_patch7?")
    said = refusal(place, capsys, *argv, "models:/mae-vit_pico_patch7@champion")
    assert said == ("model mae-vit_pico_patch7 has no alias @champion; its aliases are none, its newest version is 0")
    assert "has no version 3" in refusal(place, capsys, *argv, "models:/mae-vit_pico_patch7/3")
    assert "nor models:/NAME/VERSION" in refusal(place, capsys, *argv, "models:/mae-vit_pico_patch7")
    said = refusal(place, capsys, "reconstruct", "--uri", uri, "--model", "models:/mae-vit_pico_patch7@candidate")
    assert "has no alias @candidate" in said


def test_mlflow_out_of_reach(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    uri = labelled(place)
    with socket.socket() as server:  # bound and not listening: connections are refused
        server.bind(("127.0.0.1", 0))
        address = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        said = refusal(place, capsys, "pretrain", "--data.uri", uri, *SMALL)
    assert "does not respond; start it, correct MLFLOW_TRACKING_URI, or unset it" in said
    assert "secret" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    assert "'nonsense' is neither a server nor" in refusal(place, capsys, "pretrain", "--data.uri", uri, *SMALL)


def test_a_local_mlflow_beside_a_remote_cluster(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    said = refusal(place, capsys, "pretrain", "--data.uri", labelled(place), *SMALL)
    assert "start `mlflow server` and set MLFLOW_TRACKING_URI" in said


def test_a_run_folder_of_another_config(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.runs.folder import RunFolder

    RunFolder(str(place / "runs" / "mine")).claim({"kind": "pretrain", "config": {"epochs": 1}})
    said = refusal(place, capsys, "pretrain", "--name", "mine", "--data.uri", labelled(place), *SMALL)
    assert "holds a run with another config." in said
    assert said.endswith("try another --name, or --fresh to replace it")


def test_another_config_of_a_finished_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.runs.folder import RunFolder

    folder = RunFolder(str(place / "runs" / "mine"))
    folder.claim({"kind": "pretrain", "config": {"epochs": 1}})
    folder.mark_published({"loss": 0.1})
    said = refusal(place, capsys, "pretrain", "--name", "mine", "--data.uri", labelled(place), *SMALL)
    assert "holds a run with another config." in said


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_folder_of_something_else_is_neither_used_nor_cleared(
    place: Path, capsys: pytest.CaptureFixture[str], fresh: list[str]
) -> None:
    uri = labelled(place)
    said = refusal(
        place, capsys, "pretrain", "--output", str(place), "--name", "data", "--data.uri", uri, *SMALL, *fresh
    )
    assert said.endswith("holds something else than a run; try another --name or --output")


def test_a_name_that_mlflow_cannot_find_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(place, capsys, "pretrain", "--name", "bad name!", "--data.uri", labelled(place), *SMALL)
    assert said.endswith("try letters, digits, . _ / -")
    assert not (place / "runs").exists()


def test_channels_that_the_images_do_not_have(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    (place / "images").mkdir()
    for i, pixels in enumerate(colours):
        Image.fromarray(pixels).save(place / "images" / f"{i}.png")
    prepare.prepare(str(place / "images"), str(place / "data"), PrepareConfig())
    said = refusal(place, capsys, "pretrain", "--data.uri", str(place / "data"), *SMALL, "--model.channels", "4")
    assert said.endswith("try --model.channels 3")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """File permissions count: root is not asked for any, so root becomes somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_storage_without_permission(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Outside pytest's folders, which are closed to others.
    with tempfile.TemporaryDirectory(prefix="mae-wrong-") as scratch:
        folder = Path(scratch)
        uri = labelled(folder)
        (folder / "locked").mkdir()
        (folder / "mlflow").mkdir()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
        monkeypatch.chdir(folder)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.chmod(0o755)
        (folder / "mlflow").chmod(0o777)
        (folder / "locked").chmod(0o555)
        with as_nobody():
            said = refusal(folder / "data", capsys, "prepare", "images", "locked/out")
            assert said.startswith("no permission to write")
            assert said.endswith("check the folder's owner and mode")
        # As root, since nobody may not import MLflow from a root's home; /sys takes no folder from anyone.
        said = refusal(
            folder / "data", capsys, "pretrain", "--data.uri", uri, "--output", "/sys/kernel", "--name", "m", *SMALL
        )
        assert said == "no permission to write /sys/kernel/m/run.json; check the folder's owner and mode"
        assert not list((folder / "locked").iterdir())
        (folder / "data" / "manifest.json").chmod(0)
        with as_nobody():
            assert cli.run(["pretrain", "--data.uri", uri, *SMALL]) == 2
        assert "no permission to read" in capsys.readouterr().err
        (folder / "locked").chmod(0o755)


@pytest.mark.s3
def test_an_object_store_that_refuses_the_credentials(s3: str, tmp_path: Path) -> None:
    """In a process of its own, since a process keeps the credentials that it first used."""
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "another-secret"}
    found = subprocess.run(
        [Path(sys.executable).parent / "mae", "pretrain", "--data.uri", f"{s3}/data", *SMALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert (
        found.stderr == f"mae: no permission to read {s3}/data/manifest.json; check the credentials and their policy\n"
    )
    assert not list(tmp_path.iterdir())
