"""Documentation is tested: every `mae` command in the README is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines.cli import COMMANDS, parse

README = Path(__file__).parents[1] / "README.md"


def commands(text: str) -> list[str]:
    """Lines of fenced blocks that call `mae`, continued lines joined, prompts, comments and environment left out."""
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            call = re.match(r"\s*(?:\$ )?(?:[A-Z][A-Z0-9_]*=\S+ +)*((?:\S*/)?mae +\S.*)", line)
            if call:
                found.append(call[1])
    return found


def test_commands_are_found_behind_prompts_environment_and_continuations() -> None:
    text = (
        "```sh\n$ mae demo\n"
        + "RAY_ADDRESS=x mae pretrain \\\n  --preset vit_base  # why\n.venv/bin/mae doctor\nmaelstrom\n```"
    )
    assert [shlex.split(c, comments=True) for c in commands(text)] == [
        ["mae", "demo"],
        ["mae", "pretrain", "--preset", "vit_base"],
        [".venv/bin/mae", "doctor"],
    ]


@pytest.mark.parametrize("line", commands(README.read_text()))
def test_a_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line.split("|")[0].split(">")[0], comments=True)[1:]
    if words[-1] in ("--help", "-h"):
        with pytest.raises(SystemExit):
            parse(words)
        return
    assert parse(words).command in COMMANDS


def test_the_readme_shows_commands() -> None:
    assert commands(README.read_text()), "README.md has no fenced block with a `mae` command"
