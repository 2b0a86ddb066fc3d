"""`mae inspect` counts what is there and draws it, whole or broken, before and after preparation."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import prepare as module
from pipelines.config import InspectConfig, PrepareConfig
from pipelines.prepare.inspect import inspect_uri
from pipelines.storage import storage_of
from tests.pipelines.images.field_files import png as png_of
from tests.pipelines.images.field_files import scene, tiff, tiff_pages
from tests.pipelines.sources.packing import fill


@pytest.fixture
def zoo_folder(zoo: list, tmp_path: Path) -> Path:
    for animal in zoo:
        (tmp_path / "zoo").mkdir(exist_ok=True)
        (tmp_path / "zoo" / animal.name).write_bytes(animal.content)
    return tmp_path / "zoo"


def looked_at(uri: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Image.Image]:
    found = inspect_uri(str(uri), InspectConfig(out=str(tmp_path / "sheets/sheet.png"), **options))
    return found, Image.open(io.BytesIO(Path(found["contact_sheet"]).read_bytes()))


def test_a_source_of_every_kind_of_image_is_counted_and_drawn(zoo: list, zoo_folder: Path, tmp_path: Path) -> None:
    found, sheet = looked_at(zoo_folder, tmp_path, num_images=1000)
    num_bad = sum(bool(animal.reason) for animal in zoo)
    assert found["num_found"] == len(zoo)
    assert found["num_bytes"] == sum(len(animal.content) for animal in zoo)
    assert found["num_bad_of_sample"] == f"{num_bad} of {len(zoo)}"
    assert found["splits"] == {"train": len(zoo)}
    rows = -(-(len(zoo) - num_bad) // 8) + -(-num_bad // 8)
    assert sheet.height == rows * (128 + 2 * 14 + 8) + 2 * 26 + 8
    colours = sheet.convert("RGB").getcolors(2**24)
    assert colours is not None
    assert len(colours) > 5000


@pytest.mark.s3
def test_a_sheet_goes_to_a_bucket_as_to_a_folder(zoo_folder: Path, s3: str, tmp_path: Path) -> None:
    here, _ = looked_at(zoo_folder, tmp_path)
    there = inspect_uri(str(zoo_folder), InspectConfig(out=f"{s3}/{tmp_path.name}/sheet.png"))
    assert there["contact_sheet"] == f"{s3}/{tmp_path.name}/sheet.png"
    place, name = storage_of(there["contact_sheet"])
    assert place.read(name) == Path(here["contact_sheet"]).read_bytes()


def test_a_prepared_dataset_shows_its_counts_and_its_quarantine(
    zoo: list, zoo_folder: Path, tmp_path: Path, without_ray: None
) -> None:
    manifest = module.prepare(str(zoo_folder), str(tmp_path / "out"), PrepareConfig(max_bad=1))
    found, sheet = looked_at(tmp_path / "out", tmp_path, num_images=4)
    assert found["digest"] == manifest.digest
    assert found["num_found"] == found["num_ok"] + found["num_quarantined"] + found["num_duplicates"] == len(zoo)
    assert found["reasons"] == manifest.quarantine_reasons
    assert sheet.height == 2 * (128 + 2 * 14 + 8) + 2 * 26 + 8


def test_a_sample_is_the_same_for_the_same_seed_and_spread_over_the_source(tmp_path: Path) -> None:
    from pipelines.prepare.inspect import _Sample
    from pipelines.sources import Entry

    def drawn(seed: int) -> list[int]:
        sample = _Sample(50, seed)
        for i in range(1000):
            sample.offer(Entry(str(i), str(i)))
        return [int(entry.name) for entry in sample.entries]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 50
    assert 350 < sum(drawn(0)) / 50 < 650


def test_a_source_shows_labels_splits_ranges_and_what_would_be_passed_over(
    png: Callable[[int], bytes], tmp_path: Path
) -> None:
    sizes = {"train/cat": 3, "train/dog": 2, "test/cat": 1}
    images = {f"{folder}/{i}.png": png(i + 10 * n) for n, folder in enumerate(sizes) for i in range(sizes[folder])}
    source = fill(tmp_path / "s", images | {"labels.csv": b"image,label\ncat,1\n", "film.mp4": b"x"})
    found, sheet = looked_at(source, tmp_path)
    assert (found["source_kind"], found["splits"]) == ("folder of images", {"train": 5, "test": 1})
    assert (found["classes"], found["labels"]) == ({"cat": 4, "dog": 2}, "auto")
    assert found["label_candidates"] == {"file:labels.csv": "table with columns image, label"}
    assert found["passed_over"] == {"no image (*.csv)": 1, "no image (*.mp4)": 1}
    assert found["passed_over_examples"]["no image (*.mp4)"] == "film.mp4"
    assert (found["num_found"], found["num_images"], found["num_unlabelled"]) == (8, 6, 0)
    (gray,) = found["value_ranges"]
    assert 0 <= gray["min"] <= gray["p1"] < 30 < 220 < gray["p99"] <= gray["max"] <= 255
    assert not (source / "manifest.json").exists()
    unlabelled, other = looked_at(source, tmp_path, labels="none")
    assert (unlabelled["classes"], unlabelled["num_unlabelled"]) == ({}, 6)
    assert sheet.tobytes() != other.tobytes(), "labels are printed below the images"


def test_value_ranges_are_those_of_each_channel(tmp_path: Path) -> None:
    for number, colour in enumerate(((10, 20, 30), (50, 20, 90))):
        Image.new("RGB", (10, 10), colour).save(tmp_path / f"{number}.png")
    Image.new("L", (1, 1), 60).save(tmp_path / "gray.png")
    found, _ = looked_at(tmp_path, tmp_path)
    assert [(c["min"], c["max"]) for c in found["value_ranges"]] == [(10, 60), (20, 60), (30, 90)]
    assert found["value_ranges"][1] == {"min": 20, "p1": 20, "p99": 20, "max": 60}


def test_value_ranges_are_those_of_the_file_whatever_their_type(tmp_path: Path) -> None:
    images = [scene(13, seed, largest=9000) for seed in range(3)]
    for number, values in enumerate(images):
        (tmp_path / f"{number}.tif").write_bytes(tiff(values, compression="zlib"))
    (tmp_path / "preview.png").write_bytes(png_of(Image.new("L", (4, 4))))
    found, _ = looked_at(tmp_path, tmp_path)
    assert found["pixels"] == {"uint16 in 13 channels": 3, "uint8 in 1 or 3 channels": 1}
    channels = np.stack(images).reshape(-1, 13)
    wanted = zip(channels.min(0), *np.percentile(channels, (1, 99), 0, method="inverted_cdf"), channels.max(0))
    assert [tuple(channel.values()) for channel in found["value_ranges"]] == list(wanted)
    assert (found["options_needed"], found["num_bad_of_sample"]) == ({}, "1 of 4"), "a dataset holds one kind"


def test_what_needs_an_option_is_named_with_it_and_looked_at(tmp_path: Path) -> None:
    pages = np.stack([scene(1, k)[:, :, 0] for k in range(5)]).astype(np.float32) / 65535
    (tmp_path / "stack.tif").write_bytes(tiff_pages(pages))
    found, _ = looked_at(tmp_path, tmp_path)
    assert list(found["options_needed"]) == ["several frames"]
    assert "--frames first" in found["options_needed"]["several frames"]
    assert found["num_bad_of_sample"] == "1 of 1"
    (fractions,) = found["value_ranges"]
    assert (fractions["min"], fractions["max"]) == (pages[2].min(), pages[2].max())


def test_a_dataset_shows_its_values(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tif").write_bytes(tiff(scene(4)))
    config = PrepareConfig(val_fraction=0, range=("min-max",))
    module.prepare(str(tmp_path / "s"), str(tmp_path / "out"), config)
    found, _ = looked_at(tmp_path / "out", tmp_path)
    assert (found["dtype"], found["channels"], found["values"]["range"]["kind"]) == ("uint16", 4, "min-max")
    assert len(found["values"]["maximum"]) == 4


def test_what_would_be_refused_is_refused_by_inspect_too(png: Callable[[int], bytes], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in a folder test/, but not at the top"):
        inspect_uri(str(fill(tmp_path / "s", {"data/test/a.png": png(0)})), InspectConfig(out=str(tmp_path / "s.png")))


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder of images"):
        inspect_uri(str(tmp_path / "absent"), InspectConfig())
