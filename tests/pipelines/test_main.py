"""The entry point of `mae`, with the extra `pipeline` and without it."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from pipelines.__main__ import PIPELINE_MODULES

WITHOUT = """
import sys
for absent in sys.argv[1:]:
    sys.modules[absent] = None
sys.argv[1:] = ["--help"]
from pipelines.__main__ import main
main()
"""


@pytest.mark.parametrize("absent", [["ray"], ["yaml", "ray"], list(PIPELINE_MODULES)])
def test_without_the_extra_the_command_names_the_pip_command(absent: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, *absent], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    named = ", ".join(name for name in PIPELINE_MODULES if name in absent)
    assert done.stderr == (
        f"mae: {named} missing, which the extra `pipeline` brings; "
        "run pip install '.[pipeline]' in a clone of the repository\n"
    )


def test_with_the_extra_the_module_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


@pytest.mark.slow
def test_every_requirement_of_the_extra_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = [re.split(r"[\[><=]", line)[0] for line in project["optional-dependencies"]["pipeline"]]
    installs = metadata.packages_distributions()
    brought_by = [{name.lower() for name in installs[module]} for module in PIPELINE_MODULES]
    assert len(required) == len(PIPELINE_MODULES)
    for name, distributions in zip(required, brought_by, strict=True):
        assert name in distributions
