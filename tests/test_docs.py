"""Test the documentation: commands parse; links, paths, options and settings exist."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import COMMANDS, parse
from pipelines.cli.completion import options_of
from pipelines.config import PretrainConfig
from tests.finished import finished_run

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "infra", "mae_core", "pipelines", "tests", "tune")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in ("docs", "examples", "infra") for page in sorted((ROOT / folder).rglob("*.md"))),
]
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))


def blocks(text: str) -> list[str]:
    """Content of the fenced blocks, continued lines joined."""
    found = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def prose(text: str) -> str:
    """Return the page without its fenced blocks."""
    return re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code of the prose."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text: str) -> list[str]:
    """Lines of fenced blocks that call `mae`; prompts, comments and environment left out."""
    found = []
    for block in blocks(text):
        for line in block.splitlines():
            call = re.match(r"\s*(?:\$ )?(?:[A-Z][A-Z0-9_]*=\S+ +)*((?:\S*/)?mae +\S.*)", line)
            if call:
                found.append(call[1])
    return found


def named_commands(text: str) -> list[str]:
    """Commands that the prose names, such as `mae bench step --rounds 5`: words before the first option or argument."""
    found = []
    for call in re.findall(r"`mae ([a-z]+(?: [a-z]+)?)[^`]*`", prose(text)):
        first, *rest = call.split()
        found.append(call if rest and call in COMMANDS else first)
    return found


def links(text: str) -> list[str]:
    """Targets of links and images that are not addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def each(find: Callable[[str], Iterable[str]]) -> list[Any]:
    """Parameters: every page with each different thing found on it."""
    return [
        pytest.param(page, item, id=f"{name_of(page)}: {item}")
        for page in PAGES
        for item in dict.fromkeys(find(page.read_text()))
    ]


def modules(text: str) -> list[str]:
    """Modules that are run by `python -m`, and scripts that are run by their path."""
    return re.findall(r"\bpython (?:-m )?((?:mae_core|pipelines|tune|infra)[\w./]*\w)", text)


def make_targets(text: str) -> list[str]:
    named = re.findall(r"`make ([a-z][\w-]*)", prose(text))
    return named + re.findall(r"^make ([a-z][\w-]*)", "\n".join(blocks(text)), re.MULTILINE)


def paths(text: str) -> list[str]:
    """Paths below the repository's folders, and Python files by the end of their path."""
    folders = "|".join(FOLDERS)
    return [span for span in spans(text) if re.fullmatch(rf"(?:{folders})/[\w./-]*|[\w/-]+\.py", span)]


def options(text: str) -> list[str]:
    """Options of `mae`, behind the command that the prose names with them if it does: `mae bench step --rounds`."""
    found = []
    for span in spans(text):
        call = re.match(r"(?:mae ([a-z]+(?: [a-z]+)?)\b.*?)?(?=--)", span)
        if call:
            command = next((c for c in (call[1], (call[1] or "").split(" ")[0]) if c in COMMANDS), "")
            found += [f"{command} {option}".strip() for option in re.findall(r"--[a-z][\w.-]*", span)]
    return found


def settings(text: str) -> list[str]:
    """Fields of the configs, written as `compute.max_failures`."""
    sections = "augment|checkpoint|compute|data|evaluate|model|optim|tracking"
    found = [span for span in spans(text) if re.fullmatch(rf"(?:{sections})(?:\.[a-z_]+)+", span)]
    return [span for span in found if not span.endswith((".safetensors", ".pth", ".onnx"))]


def options_of_command(name: str) -> set[str]:
    """Options that the command takes: the fields of its config, and those that no config has."""
    found = {"--help", "--json", "--preset", "--fresh", *options_of(COMMANDS[name].config)}
    found |= {"--estimate", "--estimate-price"} if name == "pretrain" else set()
    return found | ({"--model"} if "--backbone" in found else set())


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


def test_paths_options_and_settings_are_found_in_inline_code() -> None:
    text = "`tune/x.py`, `crops/y.py`, `a/b`, `mae bench step --rounds 5`, `--a.b-c 1 --d`, `compute.e_f`, `x.g`,"
    text += "`model.safetensors`"
    assert paths(text) == ["tune/x.py", "crops/y.py"]
    assert options(text) == ["bench step --rounds", "--a.b-c", "--d"]
    assert settings(text) == ["compute.e_f"]


def test_links_and_anchors_are_found_outside_blocks_only() -> None:
    text = "# Two words: `a_b`\n[x](y.md#z) ![p](p.png) [w](https://a.b)\n```\n[no](no.md)\n# no\n```\n"
    assert links(text) == ["y.md#z", "p.png"]
    assert anchors(text) == {"two-words-a_b"}


@pytest.mark.parametrize(("page", "line"), each(commands))
def test_a_command_in_a_block_parses(
    page: Path, line: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line.split("|")[0].split(">")[0], comments=True)[1:]
    if "--extend" in words:
        # Parsing reads the config of the run that is extended, so there must be one.
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
        finished_run(PretrainConfig(name=Path(words[words.index("--extend") + 1]).name))
    if words[-1] in ("--help", "-h", "--version"):
        with pytest.raises(SystemExit):
            parse(words)
        return
    assert parse(words).command in COMMANDS


def test_a_command_in_a_message_or_docstring_exists() -> None:
    groups = {name.split()[0] for name in COMMANDS}
    named = {
        (name_of(source), name)
        for source in SOURCES
        if not name_of(source).startswith("tests/")
        for name in re.findall(r"(?<!`)`mae ([a-z]+)", source.read_text())
    }
    assert named
    assert [(source, name) for source, name in sorted(named) if name not in groups] == []


@pytest.mark.parametrize(("page", "command"), each(named_commands))
def test_a_command_in_the_prose_exists(page: Path, command: str) -> None:
    groups = {name.split()[0] for name in COMMANDS}
    assert command in COMMANDS or command in groups, f"{name_of(page)} names `mae {command}`"


@pytest.mark.parametrize(("page", "target"), each(make_targets))
def test_a_make_target_exists(page: Path, target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "module"), each(modules))
def test_a_module_or_script_exists(page: Path, module: str) -> None:
    path = ROOT / (module if module.endswith(".py") else module.replace(".", "/"))
    assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize(("page", "path"), each(paths))
def test_a_path_in_the_prose_exists(page: Path, path: str) -> None:
    is_module = (ROOT / f"{path}.py").is_file()
    is_end = path.endswith(".py") and any(str(source).endswith(f"/{path}") for source in SOURCES)
    assert (ROOT / path).exists() or is_module or is_end, f"{name_of(page)} names {path}, which does not exist"


@pytest.mark.parametrize(("page", "option"), each(options))
def test_an_option_in_the_prose_is_one_of_the_command(page: Path, option: str) -> None:
    *command, flag = option.rsplit(" ", 1)
    taken = set().union(*map(options_of_command, command or COMMANDS), [] if command else ["--version"])
    assert flag in taken, f"{name_of(page)} names {flag}, which {command or 'no command'} takes"


@pytest.mark.parametrize(("page", "setting"), each(settings))
def test_a_setting_in_the_prose_is_a_field_of_a_config(page: Path, setting: str) -> None:
    taken = set().union(*map(options_of_command, COMMANDS))
    assert f"--{setting.replace('_', '-')}" in taken, f"{name_of(page)} names {setting}, which no config has"


@pytest.mark.parametrize(("page", "target"), each(links))
def test_a_relative_link_leads_somewhere(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = page.parent / file if file else page
    assert path.exists(), f"{name_of(page)} links to {file}, which does not exist"
    if anchor:
        assert anchor in anchors(path.read_text()), f"{name_of(path)} has no heading #{anchor}"


def test_the_readme_shows_commands() -> None:
    assert commands((ROOT / "README.md").read_text()), "README.md has no fenced block with a `mae` command"


@pytest.mark.parametrize("page", DECISIONS, ids=[page.name for page in DECISIONS])
def test_a_decision_has_status_date_and_sections(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"^- Status: (accepted|superseded by \[\d{4}\]\(.+\))$", text, re.MULTILINE)
    assert re.search(r"^- Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


def test_the_index_lists_every_decision_under_its_title() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\d{4})\]\((.+?)\) \| (.+?) \|", index, re.MULTILINE)
    titles = [page.read_text().splitlines()[0].removeprefix("# ") for page in DECISIONS]
    assert [name for _, name, _ in listed] == [page.name for page in DECISIONS]
    assert [f"{number}: {title}" for number, _, title in listed] == titles


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_the_layers_of_the_architecture_page_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Layers")[1].split("\n## ")[0]
    shown = re.findall(r"^\| \d+ \| ([^|]+) \|", section, re.MULTILINE)
    assert [re.findall(r"[\w/]+", packages) for packages in shown] == [
        re.findall(r"[\w/]+", layer.replace(".", "/")) for layer in enforced
    ]


def test_every_package_has_a_line_in_the_readmes_layout() -> None:
    readme = (ROOT / "README.md").read_text()
    packages = [path.parent for path in ROOT.glob("pipelines/*/__init__.py")]
    assert [name_of(package) for package in packages if f"{name_of(package)}/ " not in readme] == []
