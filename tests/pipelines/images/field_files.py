"""Files as scanners, satellites and cameras write them, beside photographs."""

import io
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image


def scene(channels: int = 1, seed: int = 0, side_px: int = 40, largest: int = 65535) -> NDArray[np.uint16]:
    """Return smooth values [height width channels] from 0 to `largest`, which both occur."""
    grid = np.random.default_rng(seed).random((5, 5, channels))
    planes = [
        np.asarray(
            Image.fromarray(grid[:, :, c].astype(np.float32)).resize((side_px, side_px), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    found = np.stack(planes, axis=2)
    found = (found - found.min()) / (found.max() - found.min())
    return (found * largest).round().astype(np.uint16)


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    """Encode one page of [height width] or [height width channels]."""
    if values.ndim == 3:
        channels = values.shape[2]
        options = {"planarconfig": "contig", "photometric": "rgb" if channels == 3 else "minisblack"} | options
    return tiff_pages(values, **options)


def tiff_pages(values: NDArray[Any], **options: Any) -> bytes:
    """Encode as tifffile lays arrays out: [pages height width] and, with planarconfig "separate", [channels ...]."""
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """Encode 16 bits in one, two, three or four channels, which Pillow cannot, with one filter for all lines."""
    import struct
    import zlib

    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cloud_optimised(values: NDArray[Any], **options: Any) -> bytes:
    """Encode a tiled TIFF with two overviews, as a cloud-optimised GeoTIFF has them."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(values, tile=(16, 16), **options)
        for factor in (2, 4):
            # Overviews of other values, so that reading one would show.
            writer.write(values[::factor, ::factor] // 2, tile=(16, 16), subfiletype=1, **options)
    return file.getvalue()


def slide(scan: NDArray[np.uint8], **options: Any) -> bytes:
    """Lay out a slide as Aperio's scanners do: scan, thumbnail, a smaller level, label and macro, all full pages."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        about = f"Aperio Image Library v11.2.1 \r\n{scan.shape[1]}x{scan.shape[0]} [0,0] (16x16)|AppMag = 20|MPP = 0.5"
        writer.write(scan, tile=(16, 16), photometric="rgb", description=about, metadata=None, **options)
        writer.write(scan[::4, ::4], photometric="rgb", description="Aperio Image Library v11.2.1", metadata=None)
        writer.write(scan[::2, ::2], tile=(16, 16), photometric="rgb", metadata=None)
        for name, kind in (("label", 1), ("macro", 9)):
            writer.write(scan[:10, :20], photometric="rgb", description=f"Aperio\r\n{name} 20x10", subfiletype=kind)
    return file.getvalue()
