"""The commands of docs/web-crawls.md do what the page says, on crawls as img2dataset writes them."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.storage import open_storage
from tests.pipelines.sources.packing import fill, pack

Png = Callable[[int], bytes]
PAGE = Path(__file__).parents[3] / "docs/web-crawls.md"


def crawl(folder: Path, png: Png, per_tar: int = 12) -> None:
    """Write two tar files of triples with what img2dataset writes beside them, and a table of labels."""
    keys = [f"{tar:05d}{i:04d}" for tar in range(2) for i in range(per_tar)]
    for tar in range(2):
        members: list[tuple[str, bytes]] = []
        for number, key in enumerate(keys):
            if key.startswith(f"{tar:05d}"):
                found = {"key": key, "label": number % 2, "caption": "x"}
                members += [(f"{key}.jpg", png(number)), (f"{key}.json", json.dumps(found).encode())]
                members += [(f"{key}.txt", b"a caption"), (f"{key}.cls.txt", str(number % 3).encode())]
        pack(folder / f"crawl/{tar:05d}.tar", members)
        fill(folder / "crawl", {f"{tar:05d}.parquet": b"PAR1", f"{tar:05d}_stats.json": b"{}"})
    table = "\n".join(["image,label", *(f"{key},{'ab'[number % 2]}" for number, key in enumerate(keys))])
    fill(folder / "crawl", {"labels.csv": table.encode()})


def commands() -> list[list[str]]:
    """Return the words of each command of the page, without `mae`."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("mae ")]


@pytest.mark.slow
def test_every_command_of_the_page_works(
    png: Png, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    crawl(tmp_path, png)
    samples = [(f"s{i}.{name}", png(100 * n + i)) for i in range(4) for n, name in enumerate(("img.jpg", "seg.png"))]
    pack(tmp_path / "samples/0.tar", samples)
    manifests: dict[str, Manifest] = {}
    for number, words in enumerate(commands()):
        if words[0] == "prepare":
            words[2] = f"out-{number}"
        assert cli.run([*words, "--json"]) == 0, words
        printed = json.loads(capsys.readouterr().out)
        if words[0] == "inspect":
            assert printed["num_images"] == 24
            assert (tmp_path / "contact-sheet.png").is_file()
        else:
            manifests[" ".join(words[3:])] = read_manifest(open_storage(tmp_path / words[2]))
    names = {options: manifest.classes for options, manifest in manifests.items()}
    assert names == {
        "--labels none --max-bad 0.05": [],
        "--labels json:label": ["0", "1"],
        "--labels member:cls.txt": ["0", "1", "2"],
        "--labels file:labels.csv": ["a", "b"],
        r"--labels json:label --group-by ^([0-9]+)\.tar": ["0", "1"],
        "--image-member img.jpg": [],
    }
    grouped = manifests[r"--labels json:label --group-by ^([0-9]+)\.tar"]
    assert {name: split.num_rows for name, split in grouped.splits.items()} == {"train": 12, "val": 12}
    assert manifests["--image-member img.jpg"].num_ok == 4
    assert all(manifest.num_ok == 24 for options, manifest in manifests.items() if "member img" not in options)
