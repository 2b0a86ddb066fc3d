"""Images that pictures are drawn of, as they stand upright."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import prepare
from pipelines.config import InspectConfig, PrepareConfig
from pipelines.pictures.reconstruct import sample_images
from pipelines.prepare.inspect import inspect_uri

ROTATED = 6
"""EXIF's number for a picture that must be turned by 90 degrees to the right."""


@pytest.fixture
def photo(tmp_path: Path, without_ray: None) -> Path:
    """Return a folder with one JPEG whose left half is white as stored, and so the upper half after EXIF rotation."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.jpg", exif=exif)
    return tmp_path / "images"


def is_upright(image: np.ndarray) -> bool:
    upper, lower = np.split(image.astype(float), 2)
    return upper.mean() > 200 > 50 > lower.mean()


@pytest.mark.parametrize("kind", ["restarts", "keep"])
def test_a_turned_photograph_is_drawn_upright_from_a_folder_and_from_shards(photo: Path, kind: Any) -> None:
    from pipelines.config import EncodeConfig

    prepared = photo.parent / "prepared"
    prepare.prepare(str(photo), str(prepared), PrepareConfig(val_fraction=0.0, encode=EncodeConfig(kind=kind)))
    for uri in (photo, prepared):
        (image,) = sample_images(str(uri), "train", 1, (64, 64), 3)
        assert is_upright(image)


def test_the_contact_sheet_shows_it_upright(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.pictures.contact_sheet as module

    shown: list[np.ndarray] = []
    thumbnail = module._thumbnail

    def watched(*arguments: Any) -> Any:
        picture = thumbnail(*arguments)
        shown.append(np.asarray(picture))
        return picture

    monkeypatch.setattr(module, "_thumbnail", watched)
    prepared = photo.parent / "prepared"
    prepare.prepare(str(photo), str(prepared), PrepareConfig(val_fraction=0.0))
    inspect_uri(str(prepared), InspectConfig(out=str(photo.parent / "sheet.png")))
    assert [is_upright(image) for image in shown] == [True]


def test_an_image_that_cannot_be_drawn_is_named(photo: Path) -> None:
    (photo / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image b\.png of .* cannot be drawn"):
        sample_images(str(photo), "train", 2, (64, 64), 3)
