"""Crops are Pillow's to rounding, the same whole numbers on every machine, and nothing outside the box counts."""

import os
import subprocess
import sys
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.images.crops import crop_into
from pipelines.images.decode import Box, Scratch

sides = st.integers(1, 90)
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def cropped(pixels: np.ndarray, box: Box, flip: bool, out_hw: tuple[int, int]) -> np.ndarray:
    out = np.empty((*out_hw, pixels.shape[2]), np.uint8)
    crop_into(out, pixels, box, flip, Scratch())
    return out


def pillows(pixels: np.ndarray, box: Box, out_hw: tuple[int, int]) -> np.ndarray:
    top, left, height, width = box
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    image = Image.fromarray(part[:, :, 0] if part.shape[2] == 1 else part)
    # Along lines first, as torch and Pillow before 13 do it, which now begins with columns where that is cheaper.
    for size in ((out_hw[1], height), (out_hw[1], out_hw[0])):
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*out_hw, -1)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([1, 3]), sizes, st.booleans(), st.data())
def test_a_crop_is_pillows_to_rounding_and_mirroring_is_exact(
    height: int, width: int, channels: int, out_hw: tuple[int, int], writeable: bool, data: st.DataObject
) -> None:
    pixels = noise(height, width, channels)
    pixels.flags.writeable = writeable
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    found = cropped(pixels, box, False, out_hw)
    difference = np.abs(found.astype(int) - pillows(pixels, box, out_hw))
    # Both round to bytes between lines and columns; where one rounds the other way there, a negative weight beside it
    # may carry that on.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.05 or difference.size < 2000
    np.testing.assert_array_equal(cropped(pixels, box, True, out_hw), found[:, ::-1])


def weights(size: int, out_size: int) -> tuple[np.ndarray, int]:
    """Whole weights [out size] and their bits, as numpy makes them of the definition."""
    scale = max(size / out_size, 1.0)
    centers = (np.arange(out_size) + 0.5) * (size / out_size)
    places = np.arange(size) + 0.5
    distance = np.minimum(np.abs(places - centers[:, None]) * (1 / scale), 2.0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    shares = np.where(distance < 1, near, far)
    # Summed in order, as a loop does it.
    shares /= shares.cumsum(1)[:, -1:]
    bits = 1
    while bits < 21 and shares.max() * 2.0 ** (bits + 1) < 32_000:
        bits += 1
    whole = np.rint(shares * 2.0**bits).astype(int)
    whole[np.arange(out_size), whole.argmax(1)] += 2**bits - whole.sum(1)
    return whole, bits


def summed(pixels: np.ndarray, out_size: int) -> np.ndarray:
    """Return the weighted sums: [size ...] to [out_size ...]."""
    whole, bits = weights(len(pixels), out_size)
    total = np.tensordot(whole, pixels.astype(int), 1) + (1 << bits >> 1)
    return np.clip(total >> bits, 0, 255)


@pytest.mark.parametrize("shape", [(90, 120), (31, 17), (40, 1000), (700, 9), (28, 32), (5, 3), (1, 1), (2, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_compiled_loops_give_the_definitions_whole_numbers(shape: tuple[int, int], channels: int) -> None:
    pixels = noise(*shape, channels)
    across = summed(pixels.transpose(1, 0, 2), 32).transpose(1, 0, 2)
    np.testing.assert_array_equal(cropped(pixels, (0, 0, *shape), False, (28, 32)), summed(across, 28))


CROP = """
import zlib, numpy as np
from pipelines.images.crops import crop_into
from pipelines.images.decode import Scratch
rows, columns = np.mgrid[0:300, 0:400]
pixels = np.stack([rows * columns % 251, rows * 7 % 256, columns * 3 % 256], axis=2).astype(np.uint8)
out = np.empty((224, 224, 3), np.uint8)
crop_into(out, pixels, (11, 23, 250, 333), True, Scratch())
print(zlib.crc32(out.tobytes()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", [{}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}])
def test_every_machine_gives_the_same_bytes(machine: dict[str, str]) -> None:
    command = [sys.executable, "-c", CROP]
    found = subprocess.run(command, env={**os.environ, **machine}, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["2750136303"]


@settings(deadline=None)
@given(sides, sides, sizes, st.integers(0, 255))
def test_one_colour_stays_itself(height: int, width: int, out_hw: tuple[int, int], value: int) -> None:
    pixels = np.full((height, width, 3), value, np.uint8)
    assert (cropped(pixels, (0, 0, height, width), False, out_hw) == value).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_of_the_right_size_is_exact(channels: int) -> None:
    pixels = noise(30, 40, channels)
    np.testing.assert_array_equal(cropped(pixels, (2, 5, 8, 9), False, (8, 9)), pixels[2:10, 5:14])


@settings(deadline=None)
@given(sides, sides, sizes, st.data())
def test_nothing_outside_the_box_counts(height: int, width: int, out_hw: tuple[int, int], data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    pixels, other = noise(height, width, 3, seed=1), noise(height, width, 3, seed=2)
    inside = np.s_[top : top + box[2], left : left + box[3]]
    other[inside] = pixels[inside]
    np.testing.assert_array_equal(cropped(pixels, box, False, out_hw), cropped(other, box, False, out_hw))


def test_memory_used_before_changes_nothing() -> None:
    scratch, shapes = Scratch(), [(200, 300), (3, 2), (90, 40), (1, 700), (200, 300)]
    for number, shape in enumerate(shapes):
        pixels, out = noise(*shape, 3, seed=number), np.empty((24, 28, 3), np.uint8)
        crop_into(out, pixels, (0, 0, *shape), False, scratch)
        np.testing.assert_array_equal(out, cropped(pixels, (0, 0, *shape), False, (24, 28)))


def test_a_crop_writes_nothing_beside_its_place() -> None:
    batch = np.full((3, 5, 7, 3), 99, np.uint8)
    crop_into(batch[1], noise(50, 60, 3), (0, 0, 50, 60), False, Scratch())
    assert (batch[[0, 2]] == 99).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (0, 0, 5, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (6, 0, 5, 5), (0, 6, 5, 5), (0, 0, 10**6, 5)]
)
def test_a_box_beyond_the_image_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="not within the image of 10 x 10"):
        cropped(noise(10, 10, 3), box, False, (4, 4))


def test_a_long_line_becomes_one_pixel() -> None:
    pixels = noise(1, 20_000, 3)
    found = cropped(pixels, (0, 0, 1, 20_000), False, (1, 1))
    assert np.abs(found - pillows(pixels, (0, 0, 1, 20_000), (1, 1)).astype(int)).max() <= 1
    assert ceil(float(found.mean())) in range(100, 156)
