"""Every kind of image is read as Pillow reads it, and every broken one is refused with a reason."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines.images.decode import decode, evaluation_view, inspect


def reference(content: bytes, channels: int) -> np.ndarray:
    """Decode with Pillow, with transparency over white."""
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


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(height_px: int, width_px: int, *chunks: bytes) -> bytes:
    """Return a black PNG of that size with further chunks, deflated row by row to keep the test's memory small."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    deflate = zlib.compressobj(9)
    pixels = b"".join(deflate.compress(bytes(1 + 3 * width_px)) for _ in range(height_px)) + deflate.flush()
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def bombs(zoo: list) -> dict[str, tuple[bytes, str]]:
    """Small files that would take much memory, and why each is refused."""
    unpacked = zlib.compress(bytes(900_000), 9)
    some_text = [png_chunk(b"zTXt", b"key%d\0\0" % i + unpacked) for i in range(100)]
    claims = {a.name: (a.content, "too many pixels: 30000 x 30000") for a in zoo if a.name.startswith("bomb")}
    return claims | {
        "144 megapixels": (png_of(12_000, 12_000), "too many pixels: 12000 x 12000 is more than max_pixels 64000000"),
        "long text": (png_of(8, 8, png_chunk(b"tEXt", b"key\0" + b"x" * 2**25)), "too much text"),
        "deflated text": (
            png_of(8, 8, png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8), 9))),
            "damaged header",
        ),
        "deflated texts": (png_of(8, 8, *some_text), "damaged header"),
        "deflated profile": (
            png_of(8, 8, png_chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(10**8), 9))),
            "damaged header",
        ),
        "scans": (b"\xff\xd8" + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 101, "too many scans"),
        "chunks": (png_of(8, 8, *[png_chunk(b"teSt", b"")] * 100_000), "too many chunks"),
    }


@pytest.mark.slow
def test_bombs_are_refused_with_their_reason(bombs: dict) -> None:
    for name, (content, reason) in bombs.items():
        with pytest.raises(ValueError, match=reason):
            decode(content, 3)
        assert name == "long text" or len(content) < 1_500_000


REFUSING = """
import resource, sys
from pathlib import Path
from pipelines.images.decode import decode
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
decode(files[0], 3)
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for content in files[1:]:
    try:
        decode(content, 3)
    except ValueError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) // 1024)
"""


def test_refusing_bombs_takes_little_memory(bombs: dict, zoo: list, tmp_path: Path) -> None:
    """In a process of its own, whose peak is nobody else's."""
    (tmp_path / "0").write_bytes(next(a.content for a in zoo if a.name == "colour.PNG"))
    for name, (content, _) in bombs.items():
        (tmp_path / f"bomb {name}").write_bytes(content)
    found = subprocess.run([sys.executable, "-c", REFUSING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 50, "MiB"


def test_the_limit_on_pixels_is_the_callers(zoo: list) -> None:
    content = next(a.content for a in zoo if a.name == "colour.PNG")
    assert inspect(content, 48 * 64).height_px == 48
    with pytest.raises(ValueError, match="64 x 48 is more than max_pixels 3071"):
        inspect(content, 48 * 64 - 1)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_an_image_and_nothing_else(zoo: list, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([a for a in zoo if not a.reason])).content)
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    damaged = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    damaged += data.draw(st.binary(max_size=8))
    try:
        header = inspect(damaged, 10_000_000)
        pixels = decode(damaged, header.channels, header.orientation)
    except ValueError:
        return
    assert pixels.shape == (header.height_px, header.width_px, header.channels)


@given(
    content=st.binary(max_size=64),
    magic=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0"]),
)
def test_noise_is_refused(content: bytes, magic: bytes) -> None:
    with pytest.raises(ValueError):
        decode(magic + content, 3)


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
