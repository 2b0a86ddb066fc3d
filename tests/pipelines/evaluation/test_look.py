"""Pictures of tokens and attention are the same every time, and name what they skip."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from pipelines.config import LookConfig
from pipelines.evaluation.look import look, principal_colors
from pipelines.registry import open_tracking
from tests.new_mlflow import new_mlflow


@pytest.fixture
def images(sample: Path, tmp_path: Path) -> Path:
    """Return a folder of three images and a broken one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((sample / "train" / "bag").iterdir())[:3]:
        shutil.copy(path, folder / path.name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_a_sheet_and_a_picture_per_image_are_drawn_alike_each_time(
    backbone: Path, images: Path, tmp_path: Path
) -> None:
    config = LookConfig(model=str(backbone))
    result = look(str(images), str(tmp_path / "a"), config)
    assert (result["num_images"], result["num_undecodable"]) == (3, 1)
    assert result["undecodable"][0]["image"] == "broken.png"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == result["pictures"]
    assert len(result["pictures"]) == 4
    look(str(images), str(tmp_path / "b"), config)
    for name in result["pictures"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.height > 600


def test_a_larger_input_resizes_the_positions(backbone: Path, images: Path, tmp_path: Path) -> None:
    config = LookConfig(model=str(backbone), image_px=(56, 28), num_images=1)
    assert look(str(images), str(tmp_path / "out"), config)["num_images"] == 1
    with pytest.raises(UserError, match="image side 30px is not a multiple of patch 4px; try 32px"):
        look(str(images), str(tmp_path / "out"), dataclasses.replace(config, image_px=(30, 28)))


def test_colours_depend_on_no_order_and_no_sign() -> None:
    tokens = np.random.default_rng(0).normal(size=(5, 7, 12)) * np.arange(1, 13)
    colors = principal_colors(tokens)
    assert colors.shape == (5, 7, 3)
    assert (colors.min((0, 1)) == 0).all()
    assert (colors.max((0, 1)) == 255).all()
    order = [3, 1, 4, 0, 2]
    assert np.abs(principal_colors(tokens[order]).astype(int) - colors[order]).max() <= 1


def test_the_first_colour_is_the_direction_of_most_variance() -> None:
    line = np.linspace(-1, 1, 60).reshape(3, 20)
    tokens = np.stack([0.1 * line**2, 5 * line, 0.1 * line**3, 0 * line], axis=2)
    red = principal_colors(tokens)[..., 0].ravel().astype(int)
    assert (np.diff(red) >= 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_pictures_are_logged_if_asked_for(
    backbone: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    result = look(str(images), str(tmp_path / "out"), LookConfig(model=str(backbone), num_images=1, log=True))
    client = open_tracking("mae").client
    assert client.get_run(result["run_id"]).data.tags["mae.kind"] == "look"
    assert {file.path for file in client.list_artifacts(result["run_id"])} == {"result.json", *result["pictures"]}


def test_a_folder_without_images_is_refused(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no images; give a folder with .jpg"):
        look(str(tmp_path / "empty"), str(tmp_path / "out"), LookConfig(model=str(backbone)))
