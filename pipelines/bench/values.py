"""Time of images beyond 8 bits per core: what the feed does with stored values, against other loaders, interleaved.

`python -m pipelines.bench.values [ROUNDS]` prints milliseconds of CPU per crop of 224 px on one thread.
"""

import io
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import rasterio.windows
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from torchvision.transforms import InterpolationMode, v2

from mae_core.config import AugmentConfig
from mae_core.views import crop_boxes, flips
from pipelines.images.crops import crop_values_into
from pipelines.images.decode import Scratch
from pipelines.images.decode.stored import pack

_OUT_PX, _SIDE_PX, _SCENE_PX, _NUM = 224, 512, 4096, 64
_LARGEST = 4095


def _scene(seed: int, side_px: int, channels: int) -> NDArray[np.uint16]:
    """Return smooth values of twelve bits with noise of deviation 12, [height width channels]."""
    chance = np.random.default_rng(seed)
    found = np.empty((side_px, side_px, channels), np.uint16)
    for channel in range(channels):
        grid = Image.fromarray(chance.random((9, 9)).astype(np.float32)).resize((side_px, side_px), 3)
        values = np.asarray(grid) * 3500 + 300 + chance.normal(0, 12, (side_px, side_px))
        found[:, :, channel] = np.clip(values, 0, _LARGEST)
    return found


def _ours(stored: list[bytes], channels: int) -> Callable[[int], None]:
    scratch, out = Scratch(), np.empty((_OUT_PX, _OUT_PX, channels), np.float32)
    limits = np.zeros(channels), np.full(channels, float(_LARGEST))
    sides = np.full(_NUM, _SIDE_PX)

    def run(number: int) -> None:
        ids, config = np.arange(_NUM), AugmentConfig(scale=(0.2, 1.0))
        boxes = crop_boxes(config, seed=0, epoch=number, sample_ids=ids, heights_px=sides, widths_px=sides)
        mirrored = flips(config, seed=0, epoch=number, sample_ids=ids)
        for i in range(_NUM):
            box = tuple(int(value) for value in boxes[i])
            crop_values_into(out, stored[i % len(stored)], limits, box, bool(mirrored[i]), scratch)  # pyright: ignore[reportArgumentType]

    return run


def _theirs(read: Callable[[int], NDArray[np.uint16]]) -> Callable[[int], None]:
    """Return what a DataLoader without workers does: `read` gives [channels height width]."""
    crop = v2.RandomResizedCrop(_OUT_PX, (0.2, 1), interpolation=InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def run(number: int) -> None:
        for i in range(_NUM):
            transform(torch.from_numpy(read(i).astype(np.float32)) / _LARGEST)

    return run


def _radiographs() -> dict[str, Callable[[int], None]]:
    images = [_scene(seed, _SIDE_PX, 1) for seed in range(12)]
    files = []
    for image in images:
        file = io.BytesIO()
        tifffile.imwrite(file, image[:, :, 0])
        files.append(file.getvalue())
    return {
        "ours": _ours([pack(image) for image in images], 1),
        "tifffile": _theirs(lambda i: tifffile.imread(io.BytesIO(files[i % 12]))[None]),
    }


def _windows() -> dict[str, Callable[[int], None]]:
    scene = _scene(0, _SCENE_PX, 4)
    # A made scene lies nowhere.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    file = MemoryFile()
    profile: dict[str, Any] = {"driver": "GTiff", "width": _SCENE_PX, "height": _SCENE_PX, "count": 4}
    profile |= {"dtype": "uint16", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    with file.open(**profile) as writer:
        writer.write(scene.transpose(2, 0, 1))
    source, per_side = file.open(), _SCENE_PX // _SIDE_PX

    def window(i: int) -> NDArray[np.uint16]:
        top, left = (_SIDE_PX * place for place in divmod(i, per_side))
        return source.read(window=rasterio.windows.Window(left, top, _SIDE_PX, _SIDE_PX))  # pyright: ignore[reportCallIssue]

    corners = [(top, left) for top in range(0, _SCENE_PX, _SIDE_PX) for left in range(0, _SCENE_PX, _SIDE_PX)]
    tiles = [pack(scene[top : top + _SIDE_PX, left : left + _SIDE_PX]) for top, left in corners]
    return {"ours": _ours(tiles, 4), "rasterio": _theirs(window)}


def measure(rounds: int) -> None:
    torch.set_num_threads(1)
    for name, loaders in (("16 bits, 1 x 512 px", _radiographs()), ("windows of a scene of 4,096 px", _windows())):
        times: dict[str, list[float]] = {loader: [] for loader in loaders}
        for run in loaders.values():
            run(0)
        for number in range(rounds):
            for loader in sorted(loaders, reverse=bool(number % 2)):
                started = time.process_time()
                loaders[loader](number)
                times[loader].append((time.process_time() - started) / _NUM * 1000)
        (ours, other) = times
        ratio = median(b / a for a, b in zip(times[ours], times[other]))
        shown = ", ".join(f"{loader} {median(found):.2f} ms" for loader, found in times.items())
        print(f"{name}: {shown}; {ratio:.2f} x")


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
