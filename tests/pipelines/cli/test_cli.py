"""The command line: every command and field explains itself, and what it prints can be read back."""

import ast
import dataclasses
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mae_core.bench.config
import mae_core.config
import pipelines.bench.config
import pipelines.config
from mae_core.errors import UserError
from pipelines import cli
from pipelines.cli import COMMANDS, Command, parse
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, load_preset
from pipelines.console import print_result
from pipelines.errors import CommandFailed
from pipelines.interrupts import Interrupted

MAE = Path(sys.executable).parent / "mae"
CONFIGURED = sorted(name for name, command in COMMANDS.items() if command.config)
WITH_PRESET = ("pretrain", "probe", "finetune", "sweep")
# Not set by a user: what names and manifests resolve to.
INTERNAL = {"Arch", "FixedCompute"}


def documented(path: Path) -> dict[str, dict[str, str]]:
    """Read the attribute docstrings of every dataclass in a file, by class and field; empty if a field has none."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.decorator_list:
            fields = found.setdefault(node.name, {})
            for here, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    fields[here.target.id] = str(text or "")
    return found


FILES = [
    *sorted(Path(str(pipelines.config.__file__)).parent.glob("*.py")),
    *(Path(str(module.__file__)) for module in (pipelines.bench.config, mae_core.config, mae_core.bench.config)),
]
DOCSTRINGS = {name: fields for path in FILES for name, fields in documented(path).items()}


def leaves(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flag and docstring of every field that is no dataclass itself."""
    for field in dataclasses.fields(config):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            flag = f"--{prefix}{field.name}".replace("_", "-")
            # A field may be inherited.
            owners = (DOCSTRINGS.get(cls.__name__, {}) for cls in config.__mro__)
            yield flag, next(fields[field.name] for fields in owners if field.name in fields)


def squeezed(text: str) -> str:
    """Return the text without frames and spaces, so that line breaks do not matter."""
    return re.sub(r"[\s│╭╰╮╯─]", "", text)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse([*name.split(), "--help"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_every_field_has_a_docstring() -> None:
    missing = [
        f"{cls}.{field}"
        for cls, fields in DOCSTRINGS.items()
        if cls not in INTERNAL and cls != "Command"
        for field, text in fields.items()
        if not text.strip()
    ]
    assert not missing


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_explains_every_field_of(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    shown = squeezed(help_of(name, capsys))
    assert squeezed(command.help) in shown
    assert command.config is not None
    for flag, text in leaves(command.config):
        assert flag in shown, f"{flag} is not in the help of {name}"
        assert squeezed(text)[:40] in shown, f"{flag} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(name, capsys)
    assert squeezed(COMMANDS[name].help) in squeezed(shown)
    assert "--json" in shown
    for word, _ in COMMANDS[name].positional:
        assert word in shown


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        with pytest.raises(SystemExit) as stop:
            parse(argv)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", WITH_PRESET)
def test_what_config_prints_is_a_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--pretrain.epochs" if name == "sweep" else "--epochs"
    assert cli.run(["config", name, flag, "123"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse([name, "--preset", str(path)]).config == parse([name, flag, "123"]).config


def test_config_of_a_preset_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "pretrain", "--preset", "vit_large", "--model.mask.ratio", "0.6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "pretrain"
    assert said["model"]["mask"]["ratio"] == 0.6
    assert said["model"]["arch"] == "vit_large_patch16"


def test_fields_go_on_top_of_the_preset_wherever_it_stands() -> None:
    for argv in (
        ["pretrain", "--preset", "vit_base", "--epochs", "100"],
        ["pretrain", "--epochs", "100", "--preset=vit_base", "--fresh", "--json"],
    ):
        call = parse(argv)
        assert call.config == dataclasses.replace(load_preset(PretrainConfig, "vit_base"), epochs=100)
        assert call.preset == "vit_base"
        assert (call.fresh, call.json) == ("--fresh" in argv, "--json" in argv)


@pytest.mark.slow
def test_flags_of_every_type_arrive() -> None:
    words = (
        "pretrain --data.uri x --data.labels-per-class 5 --optim.betas 0.8 0.9 --augment.no-flip "
        "--model.image-px 28 56 --model.arch vit_pico_patch7 --optim.base-lr 1e-3 --compute.gpu"
    )
    config = parse(shlex.split(words)).config
    assert config.data.labels_per_class == 5
    assert parse(["probe", "--labels", "1%"]).config.labels == "1%"
    assert parse(["finetune", "--classifier.train-blocks", "0.5"]).config.classifier.train_blocks == 0.5
    assert config.optim.betas == (0.8, 0.9)
    assert config.augment.flip is False
    assert config.model.image_px == (28, 56)
    assert config.optim.base_lr == 1e-3
    assert config.compute.gpu is True
    for words, gpu in (("--compute.no-gpu", False), ("--compute.gpu auto", "auto"), ("--compute.gpu --seed 1", True)):
        assert parse(["pretrain", *words.split()]).config.compute.gpu == gpu
    compute = parse(shlex.split("sweep --pretrain.compute.gpu --pretrain.compute.no-compile")).config.pretrain.compute
    assert (compute.gpu, compute.compile, compute.num_workers) == (True, False, "auto")
    config = parse(["sweep", "--space", "model.mask.ratio=0.5,0.9", "model.decoder_depth=1"]).config
    assert config.space == {"model.mask.ratio": [0.5, 0.9], "model.decoder_depth": [1]}
    call = parse(["prepare", "in", "out", "--val-fraction", "0.2"])
    assert call.arguments == ("in", "out")
    assert call.config.val_fraction == 0.2


def test_probe_and_finetune_do_not_take_each_others_presets() -> None:
    with pytest.raises(ValueError, match=r"'probe' but the command is finetune; try `mae probe`"):
        parse(["finetune", "--preset", "vit_base_probe"])
    with pytest.raises(ValueError, match=r"'finetune' but the command is probe; try `mae finetune`"):
        parse(["probe", "--preset", "vit_base_finetune"])
    assert isinstance(parse(["probe"]).config, ClassifyConfig)
    assert isinstance(parse(["sweep"]).config, SweepConfig)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a\nb"), 2, "mae: a b\n"),
        (PermissionError("no permission to write x; try y"), 2, "mae: no permission to write x; try y\n"),
        (CommandFailed("the workers gave up"), 1, "mae: failed: the workers gave up\n"),
        (KeyboardInterrupt(), 130, "mae: stopped\n"),
        (Interrupted("x stopped at step 3 of 9"), 130, "mae: x stopped at step 3 of 9\n"),
    ],
)
def test_exit_code_tells_user_errors_from_failed_runs(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(call: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", Command(help="Fails.", config=None, run=run))
    assert cli.run(["doctor"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_help_and_docs_list_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out.split("exit codes:")[1]
    assert [line.split(maxsplit=1) for line in shown.strip().splitlines()] == [
        [str(int(code)), code.meaning] for code in cli.ExitCode
    ]
    page = (Path(__file__).parents[3] / "docs" / "commands.md").read_text()
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(cli.ExitCode)


@pytest.mark.parametrize("error", [ValueError("not a user's"), RuntimeError("at all"), KeyError("x")])
def test_a_bug_prints_its_traceback_and_how_to_report_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(call: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", Command(help="Fails.", config=None, run=run))
    assert cli.run(["doctor", "--json"]) == cli.ExitCode.BUG == 70
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Traceback (most recent call last):")
    assert captured.err.endswith("please report it with the lines above and the command: mae doctor --json\n")


def test_results_go_to_stdout_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"text": "a table", "top1": 76.4, "model": "models:/x/1"}
    monkeypatch.setitem(COMMANDS, "doctor", Command(help="Works.", config=None, run=lambda call: result))
    assert cli.run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"top1": 76.4, "model": "models:/x/1"}
    assert captured.err == ""
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr().out == "a table\n"


def test_the_installed_command_refuses_without_a_traceback(tmp_path: Path) -> None:
    found = subprocess.run([MAE, "pretrain", "--data.bacth", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == "mae: unknown option --data.bacth; did you mean --data.batch?\n"
    assert found.stdout == ""
    assert not list(tmp_path.iterdir())


def test_help_is_quick_since_it_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pipelines.cli import parse; parse(['pretrain']); "
        "print({'torch', 'ray', 'mlflow'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_presets_listed_in_an_error_are_loadable() -> None:
    with pytest.raises(ValueError, match="try ") as caught:
        parse(["pretrain", "--preset", "zzzz"])
    names = str(caught.value).split("try ")[1].split(", ")
    assert all((pipelines.config.PRESETS / f"{name}.yaml").is_file() for name in names)
    assert yaml.safe_load((pipelines.config.PRESETS / f"{names[0]}.yaml").read_text())["kind"]


@pytest.mark.parametrize("words", [["--model", "models:/mae-x@champion"], ["--model=models:/mae-x@champion"]])
@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_a_classifier_starts_from_what_model_names(command: str, words: list[str]) -> None:
    assert parse([command, *words]).config.backbone == "models:/mae-x@champion"


def test_a_command_of_two_words_is_found_and_a_part_of_it_is_not() -> None:
    assert parse(["bench", "step", "--batch", "8"]).command == "bench step"
    for argv in (["bench"], ["bench", "stop"]):
        with pytest.raises(ValueError, match=r"unknown command 'bench.*did you mean bench step\?"):
            parse(argv)


def test_several_equal_results_are_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("bench step", {"objects": [{"a": 1}, {"a": 2}], "text": "table"}, as_json=True)
    print_result("bench step", {"objects": [{"a": 1}, {"a": 2}], "text": "table"}, as_json=False)
    assert capsys.readouterr().out == '{"a": 1}\n{"a": 2}\ntable\n'


def test_what_pretraining_continues_from_and_which_fields_are_stated() -> None:
    version = "models:/mae-vit_base_patch16@candidate"
    call = parse(["pretrain", "--model", version, "--model.image-px", "64", "64", "--model.mask.ratio=0.5"])
    assert call.config.backbone == version
    assert call.stated == {"backbone", "model.image_px", "model.mask.ratio"}
    assert {"model.arch", "epochs"} <= parse(["pretrain", "--preset", "nano"]).stated


def test_fewer_epochs_than_the_warm_up_scale_it_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = parse(["pretrain", "--epochs", "20"]).config
    assert (config.epochs, config.optim.warmup_epochs) == (20, 1.0)
    assert "optim.warmup_epochs is scaled from 40 to 1, since epochs are 20 instead of 800" in caplog.text
    assert parse(["pretrain", "--epochs", "40"]).config.optim.warmup_epochs == 40
    with pytest.raises(UserError, match="warmup_epochs 30 exceeds epochs 20"):
        parse(["pretrain", "--epochs", "20", "--optim.warmup-epochs", "30"])
