"""The completion scripts, run by the shells themselves."""

import shutil
import subprocess

import pytest

from pipelines.cli import COMMANDS, main
from pipelines.cli.completion import SHELLS, completion, options_of


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


def completed(source: str, *words: str) -> list[str]:
    """Return bash's completions of the last word."""
    line = " ".join(f"'{word}'" for word in words)
    call = f'{source}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _mae; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    source = script("bash", capsys)
    assert completed(source, "mae", "pre") == ["prepare", "pretrain", "predict"]
    assert set(completed(source, "mae", "")) >= {name.split()[0] for name in COMMANDS}
    assert completed(source, "mae", "bench", "") == ["step", "data", "feed", "embed", "prepare", "start", "recipes"]
    assert completed(source, "mae", "prepare", "--max-b") == ["--max-bad"]
    assert completed(source, "mae", "prepare", "SOURCE", "OUT", "--drop") == ["--drop-duplicates"]
    assert completed(source, "mae", "pretrain", "--model.mask.r") == ["--model.mask.ratio"]
    assert completed(source, "mae", "bench", "step", "--rou") == ["--rounds"]


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.config])
def test_the_offered_options_are_those_of_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert not [option for option in options_of(COMMANDS[name].config) if option not in shown]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_that_is_here_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = script(shell, capsys)
    assert "prepare" in source
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=source, text=True, check=False).returncode == 0


def test_an_unknown_shell_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no completion for 'csh'; try one of bash, zsh, fish"):
        completion("csh", {})
