"""Every kind of image is read as Pillow reads it, and every broken one is refused with a reason."""

import io
import resource

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.decode import crop_resize, decode, evaluation_view, inspect


def reference(content: bytes, channels: int) -> np.ndarray:
    """What Pillow makes of it, alpha over white."""
    image = Image.open(io.BytesIO(content))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_whole_image_is_what_pillow_makes_of_it(zoo: list, channels: int) -> None:
    for animal in zoo:
        if not animal.reason:
            header = inspect(animal.content)
            found = decode(animal.content, channels, header.orientation)
            expected = reference(animal.content, channels)
            assert found.shape == (header.height_px, header.width_px, channels), animal.name
            assert found.dtype == np.uint8
            # Both use libjpeg-turbo, of different builds; luma of a colour JPEG is its Y plane.
            limit = 4 if "jpg" in animal.name else 1
            assert np.abs(found.astype(int) - expected).max() <= limit, animal.name
            np.testing.assert_array_equal(found, decode(animal.content, channels))


def test_the_header_tells_gray_from_colour(zoo: list) -> None:
    gray = {a.name for a in zoo if not a.reason and inspect(a.content).channels == 1}
    assert gray == {
        "gray.jpg", "gray.png", "gray-alpha.png", "sixteen-bit.png", "one-bit.png"
    }  # fmt: skip


def test_every_broken_image_is_refused_with_its_reason(zoo: list) -> None:
    for animal in zoo:
        if animal.reason:
            with pytest.raises(ValueError, match=animal.reason):
                decode(animal.content, inspect(animal.content).channels)


def test_a_bomb_is_refused_before_it_takes_memory(zoo: list) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for animal in zoo:
        if animal.name.startswith("bomb"):
            with pytest.raises(ValueError, match="30000 x 30000 is more than max_pixels 64000000"):
                decode(animal.content, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_limit_on_pixels_is_the_callers(zoo: list) -> None:
    content = next(a.content for a in zoo if a.name == "colour.PNG")
    assert inspect(content, 48 * 64).height_px == 48
    with pytest.raises(ValueError, match="64 x 48 is more than max_pixels 3071"):
        inspect(content, 48 * 64 - 1)


def test_any_damage_is_an_error_or_an_image_and_nothing_else(zoo: list) -> None:
    rng = np.random.default_rng(0)
    whole = [a for a in zoo if not a.reason]
    for trial in range(600):
        content = bytearray(whole[trial % len(whole)].content)
        for place in rng.integers(0, len(content), 1 + trial % 8):
            content[place] = rng.integers(256)
        damaged = bytes(content[: rng.integers(1, len(content) + 1)] if trial % 3 == 0 else content)
        try:
            header = inspect(damaged, 10_000_000)
            assert decode(damaged, header.channels, header.orientation).size > 0
        except ValueError:
            pass


def test_a_crop_equals_pillows_to_rounding() -> None:
    rows, columns = np.mgrid[0:90, 0:120]
    pixels = np.stack([rows * 2, columns * 2, rows + columns], axis=2).astype(np.uint8)
    box = (10, 20, 63, 77)
    found = crop_resize(pixels, box, False, (28, 32))
    image = Image.fromarray(pixels).crop((20, 10, 97, 73)).resize((32, 28), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 1
    np.testing.assert_array_equal(crop_resize(pixels, box, True, (28, 32)), found[:, ::-1])


def test_a_crop_of_the_right_size_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 1), dtype=np.uint8)
    np.testing.assert_array_equal(crop_resize(pixels, (2, 5, 8, 9), False, (8, 9)), pixels[2:10, 5:14])


@pytest.mark.parametrize("shape", [(28, 28), (20, 50), (64, 28), (224, 300), (3, 3), (256, 256)])
def test_evaluation_sees_the_centre_at_the_inputs_size(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    middle = (slice(shape[0] // 3, -(shape[0] // 3)), slice(shape[1] // 3, -(shape[1] // 3)))
    pixels[middle] = 255
    view = evaluation_view(pixels, (28, 28))
    assert view.shape == (28, 28, 3)
    assert view[14, 14].min() > 240
    np.testing.assert_allclose(view, view[:, ::-1], atol=30)


def test_evaluation_leaves_the_inputs_size_alone_and_crops_to_seven_eighths() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    assert evaluation_view(pixels, (28, 28)) is pixels
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 1))
    assert evaluation_view(ramp, (224, 224))[0, [0, -1], 0].tolist() == [16, 239]
