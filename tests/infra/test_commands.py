"""Every `mae` command line in compose, manifests and infra/README.md parses."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines.cli import parse


def readme_commands(text: str) -> list[str]:
    """Return the words after `mae` in every command of a code block, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.partition("  #")[0] for line in blocks.splitlines()]
    return [found.group(1) for line in lines if (found := re.match(r"(?:.* --rm )?mae (.*)$", line))]


def test_commands_of_the_readme_parse(repository: Path) -> None:
    commands = readme_commands((repository / "infra/README.md").read_text())
    assert {line.split()[0] for line in commands} >= {"prepare", "pretrain", "sweep", "doctor"}
    for line in commands:
        parse(shlex.split(line))


@pytest.mark.parametrize("folder", ["base", "overlays/example"])
def test_entrypoints_of_jobs_parse(infra, repository: Path, folder: str) -> None:
    jobs = [
        item for item in infra.kustomization.resolve(repository / "infra/kuberay" / folder) if item["kind"] == "RayJob"
    ]
    words = [shlex.split(job["spec"]["entrypoint"]) for job in jobs]
    assert [line[:2] for line in words] == [["mae", "finetune"], ["mae", "pretrain"], ["mae", "sweep"]]
    for line in words:
        parse(line[1:])


def test_the_compose_job_parses(infra, repository: Path) -> None:
    (compose,) = infra.kustomization.load(repository / "infra/compose/compose.yaml")
    job = compose["services"]["mae"]
    assert job["entrypoint"][-1] == "mae"
    parse(job["command"])


def test_a_misspelt_field_does_not_parse() -> None:
    with pytest.raises(ValueError, match="num-workrs"):
        parse(shlex.split("pretrain --preset vit_base --compute.num-workrs 2"))
