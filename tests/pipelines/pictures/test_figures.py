"""Pictures show every image, small ones pixel by pixel, and nothing lies over anything else."""

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.figures import Block, reconstruction_rows


def triples(count: int, height_px: int, width_px: int, channels: int):
    """Each image of one colour of its own, so that it can be found in the picture."""
    found = []
    for i in range(count):
        images = [np.full((height_px, width_px, channels), 10 + 7 * (3 * i + j), np.uint8) for j in range(3)]
        found.append(tuple(images))
    return found


def draw(path, *blocks: Block) -> np.ndarray:
    reconstruction_rows(blocks, path)
    with Image.open(path) as image:
        return np.asarray(image)


def place(page: np.ndarray, value: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the image of that colour; letters have it in single pixels only."""
    same = (page == value).all(-1)
    rows, columns = (np.flatnonzero(same.sum(axis) > 30) for axis in (1, 0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


@pytest.mark.parametrize(
    ("height_px", "width_px", "channels", "factor"),
    [(28, 28, 1, 4), (32, 32, 3, 4), (64, 64, 3, 2), (224, 224, 3, 1), (32, 64, 3, 2), (16, 16, 1, 7)],
)
def test_every_image_is_shown_whole_at_a_whole_factor(tmp_path, height_px, width_px, channels, factor):
    page = draw(tmp_path / "a.png", Block(title="75% masked", rows=triples(5, height_px, width_px, channels)))
    for i in range(15):
        top, left, bottom, right = place(page, 10 + 7 * i)
        assert (bottom - top, right - left) == (height_px * factor, width_px * factor)
        assert (page[top:bottom, left:right] == 10 + 7 * i).all()


def test_large_images_are_scaled_down_and_keep_their_shape(tmp_path):
    page = draw(tmp_path / "a.png", Block(title="x", rows=triples(1, 300, 600, 3)))
    top, left, bottom, right = place(page, 10)
    assert (bottom - top, right - left) == (112, 224)


def test_blocks_stand_one_under_the_other_at_equal_places(tmp_path):
    first, second = triples(8, 28, 28, 1), [tuple(image + 1 for image in t) for t in triples(8, 28, 28, 1)]
    page = draw(tmp_path / "a.png", Block(title="75% masked", rows=first), Block(title="80% masked", rows=second))
    upper, lower = place(page, 10), place(page, 11)
    assert upper[1] == lower[1]
    assert lower[0] > upper[0] + 2 * 112


def test_the_margins_are_empty_though_the_title_is_wider_than_the_images(tmp_path):
    page = draw(tmp_path / "a.png", Block(title="75% masked: 12 of 49 patches visible", rows=triples(1, 28, 28, 1)))
    for edge in (page[:20], page[-20:], page[:, :20], page[:, -20:]):
        assert (edge == 255).all()


@pytest.mark.parametrize("blocks", [[], [Block(title="75%", rows=[])]])
def test_nothing_to_show_is_an_error(tmp_path, blocks):
    with pytest.raises(ValueError, match="no image to show"):
        reconstruction_rows(blocks, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
