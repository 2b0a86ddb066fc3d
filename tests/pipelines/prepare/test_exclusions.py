"""A preparation leaves out exactly the images that a list names."""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mae_core.errors import UserError
from pipelines.config import PrepareConfig
from pipelines.prepare import prepare

pytestmark = pytest.mark.usefixtures("without_ray")


def sources_of(out: Path) -> set[str]:
    return {name for path in out.rglob("part-*.parquet") for name in pq.read_table(path)["source"].to_pylist()}


def test_exactly_the_named_images_are_left_out(few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = sorted(str(path.relative_to(few)) for path in few.rglob("*.png"))
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("\n".join(names[:10]))
    second.write_bytes(f"{names[9]}\r\n{names[20]}\r\n\nno/such.png\n{names[30]} \n".encode())
    with caplog.at_level(logging.INFO, "pipelines"):
        manifest = prepare(str(few), str(tmp_path / "a"), PrepareConfig(exclude=(str(first), str(second))))
    assert sources_of(tmp_path / "a") == set(names) - {*names[:10], names[20]}
    assert manifest.num_found == len(names) - 11
    assert manifest.summary["num_excluded"] == 11
    assert f"11 images of {few} are left out by --exclude {first} {second}" in caplog.text
    assert f"2 of 13 names in {first} {second} match no image of {few}: no/such.png, {names[30]} " in caplog.text


def test_the_list_is_part_of_the_identity_and_its_place_is_not(few: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(few)) for path in few.rglob("*.png"))
    for file, content in {"a.txt": names[:2], "b.txt": names[1::-1], "c.txt": names[:3]}.items():
        (tmp_path / file).write_text("\n".join(content))
    config = {file: PrepareConfig(exclude=(str(tmp_path / file),)) for file in ("a.txt", "b.txt", "c.txt")}
    first = prepare(str(few), str(tmp_path / "out"), config["a.txt"])
    assert prepare(str(few), str(tmp_path / "out"), config["b.txt"]) == first
    for other in (config["c.txt"], PrepareConfig()):
        with pytest.raises(UserError, match="another source and config"):
            prepare(str(few), str(tmp_path / "out"), other)
    assert "exclude" not in prepare(str(few), str(tmp_path / "all"), PrepareConfig()).config


def test_a_list_of_everything_and_no_text_are_refused(few: Path, tmp_path: Path) -> None:
    everything, binary = tmp_path / "all.txt", tmp_path / "binary.txt"
    everything.write_text("\n".join(str(path.relative_to(few)) for path in few.rglob("*.png")))
    binary.write_bytes(b"\xff\xfe")
    for file, said in ((everything, "names all 300 images of .*; shorten"), (binary, "is not text in UTF-8; give")):
        with pytest.raises(UserError, match=said):
            prepare(str(few), str(tmp_path / "out"), PrepareConfig(exclude=(str(file),)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        prepare(str(few), str(tmp_path / "out"), PrepareConfig(exclude=(str(tmp_path / "nowhere.txt"),)))
