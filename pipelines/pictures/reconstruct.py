"""Reconstruct hidden patches with a pretrained model, for figures in the style of the paper's Figures 2 and 3."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.augment import input_to_pixels, pixels_to_input
from mae_core.config import MaskConfig, Size
from mae_core.errors import UserError
from mae_core.masking import sample_masks
from mae_core.model import MaskedAutoencoder
from mae_core.normalization import Normalization, ValueRange
from mae_core.pretrained import mae_of
from pipelines import registry
from pipelines.config import ReconstructConfig
from pipelines.dataset.manifest import Split, is_prepared, read_manifest
from pipelines.images.decode import SUFFIXES, ImageArray, input_view
from pipelines.pictures.figures import Block, reconstruction_rows, shown_pixels
from pipelines.storage import Storage, open_storage, storage_of


@torch.inference_mode()
def reconstruct(
    mae: MaskedAutoencoder,
    normalization: Normalization,
    images: NDArray[Any],
    mask: MaskConfig,
    seed: int,
    bands: Sequence[int] = (),
) -> list[tuple[ImageArray, ImageArray, ImageArray]]:
    """Return (masked, reconstruction, original) of each image [n h w c] as uint8, in the channels `bands` if given."""
    device = next(mae.parameters()).device
    ids = torch.arange(len(images), device=device)
    masks = sample_masks(mask, mae.config.grid, seed=seed, epoch=0, sample_ids=ids)
    inputs = pixels_to_input(torch.from_numpy(images).to(device), normalization)
    masked, restored = mae.reconstruct(inputs, masks)
    pictures = (shown_pixels(input_to_pixels(x, normalization).cpu().numpy(), bands) for x in (masked, restored))
    return list(zip(*pictures, shown_pixels(images, bands), strict=True))


def sample_images(
    uri: str, split: str, count: int, image_px: Size, channels: int, values: ValueRange | None = None
) -> NDArray[Any]:
    """Load images [n h w c], evenly spaced over a prepared split or a folder, with evaluation's preprocessing.

    Raises UserError if there is no such split or no image, or if an image cannot be decoded.
    """
    storage = open_storage(uri)
    if not is_prepared(storage):
        return _decoded(uri, _from_folder(storage, count), image_px, channels, values)
    splits = read_manifest(storage).splits
    if split not in splits:
        raise UserError(f"dataset {storage.uri} has no split {split!r}; try one of {', '.join(splits)}")
    return split_images(uri, splits[split], count, image_px, channels, values)


def split_images(
    uri: str, split: Split, count: int, image_px: Size, channels: int, values: ValueRange | None = None
) -> NDArray[Any]:
    """Load images [n h w c] like `sample_images` from a split whose manifest has been read."""
    return _decoded(uri, _from_split(uri, split, count), image_px, channels, values)


def _decoded(
    uri: str,
    encoded: list[tuple[str, bytes, int | None]],
    image_px: Size,
    channels: int,
    values: ValueRange | None,
) -> NDArray[Any]:
    """Decode the images. Raises UserError that names one that cannot be decoded."""
    views = []
    for path, content, orientation in encoded:
        try:
            views.append(input_view(content, channels, image_px, values, orientation))
        except ValueError as error:
            raise UserError(f"image {path} of {uri} cannot be drawn ({error}); remove it") from None
    return np.stack(views)


def picture_block(
    mae: MaskedAutoencoder,
    normalization: Normalization,
    images: NDArray[Any],
    ratio: float,
    seed: int,
    bands: Sequence[int] = (),
) -> Block:
    """Return one block of a figure: reconstructions at one mask ratio, titled with the numbers of patches."""
    mask = MaskConfig(kind=mae.config.mask.kind, ratio=ratio)
    rows = reconstruct(mae, normalization, images, mask, seed, bands)
    visible, total = dataclasses.replace(mae.config, mask=mask).num_visible, mae.config.num_patches
    return Block(title=f"{ratio:.0%} masked: {visible} of {total} patches visible", rows=rows)


def run(config: ReconstructConfig) -> str:
    """Write the figure, using a model from the registry; return its path or URI."""
    if not config.uri:
        raise UserError("no images are given; try --uri with a prepared dataset or a folder of images")
    output, name = storage_of(config.out)
    remedy = "a picture needs a backbone with its decoder, such as models:/mae-<arch>"
    model = registry.read_model(config.model, "mae.safetensors", remedy=remedy)
    mae, normalization = mae_of(model.values, model.tensors)
    image_px, channels = mae.config.image_px, mae.config.channels
    if any(band >= channels for band in config.bands):
        raise UserError(f"bands {config.bands} are not all below the model's {channels} channels; count from 0")
    images = sample_images(config.uri, config.split, config.num_images, image_px, channels, normalization.values)
    blocks = [picture_block(mae, normalization, images, ratio, config.seed, config.bands) for ratio in config.ratios]
    with TemporaryDirectory() as folder:
        picture = Path(folder) / name
        reconstruction_rows(blocks, picture)
        output.write(name, picture.read_bytes())
    return output.join(name)


def _from_split(uri: str, split: Split, count: int) -> list[tuple[str, bytes, int | None]]:
    """Return source, encoded image and EXIF orientation of rows evenly spaced over the split."""
    import pyarrow as pa

    from pipelines.dataset.row_groups import RowGroups

    row_groups, rows = RowGroups(uri), split.num_rows
    wanted = np.unique(np.linspace(0, rows - 1, min(count, rows)).round().astype(np.int64))
    images: list[tuple[str, bytes, int | None]] = []
    start = 0
    for shard in split.shards:
        inside = wanted[(wanted >= start) & (wanted < start + shard.num_rows)] - start
        start += shard.num_rows
        for group in np.unique(inside // shard.rows_per_group):
            table = row_groups.read(shard.path, int(group), ["source", "image", "orientation"])
            selected = inside[inside // shard.rows_per_group == group] % shard.rows_per_group
            rows_of_group = table.take(pa.array(selected)).to_pylist()
            images += [(row["source"], row["image"], row["orientation"]) for row in rows_of_group]
    return images


def _from_folder(storage: Storage, count: int) -> list[tuple[str, bytes, int | None]]:
    paths = [path for path, _ in storage.list() if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise UserError(f"{storage.uri} is neither a prepared dataset nor a folder of images; try `mae prepare` first")
    selected = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int))
    return [(paths[i], storage.read(paths[i]), None) for i in selected]
