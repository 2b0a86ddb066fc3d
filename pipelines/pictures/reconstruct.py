"""Reconstruct hidden patches with a pretrained model, for figures in the style of the paper's Figures 2 and 3."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.augment import input_to_pixels, pixels_to_input
from mae_core.config import MaskConfig, Size
from mae_core.errors import UserError
from mae_core.masking import Mask, chosen_mask, sample_masks
from mae_core.model import MaskedAutoencoder
from mae_core.normalization import Normalization, ValueRange
from mae_core.pretrained import mae_of
from pipelines import registry
from pipelines.config import ReconstructConfig
from pipelines.dataset.manifest import Split, is_prepared, read_manifest
from pipelines.images.decode import SUFFIXES, input_view
from pipelines.pictures.figures import Block, Triple, reconstruction_rows, shown_pixels
from pipelines.storage import Storage, open_storage, storage_of


@dataclass(frozen=True, kw_only=True)
class Showing:
    """How reconstructions are shown."""

    bands: tuple[int, ...] = ()
    """Channels shown as red, green and blue, or one as gray; without them the first three."""
    paste: bool = True
    """Show visible patches as they are, instead of as they are predicted."""
    crisp: bool = False
    """Borrow mean and contrast of hidden patches from the original, for a model of normalized pixels."""


def reconstruct(
    mae: MaskedAutoencoder,
    normalization: Normalization,
    images: NDArray[Any],
    mask: MaskConfig,
    seed: int,
    showing: Showing = Showing(),
) -> list[Triple]:
    """Return (masked, reconstruction, original) of each image [n h w c] as uint8."""
    ids = torch.arange(len(images), device=next(mae.parameters()).device)
    masks = sample_masks(mask, mae.config.grid, seed=seed, epoch=0, sample_ids=ids)
    return reconstruct_masked(mae, normalization, images, masks, showing)


@torch.inference_mode()
def reconstruct_masked(
    mae: MaskedAutoencoder,
    normalization: Normalization,
    images: NDArray[Any],
    masks: Mask,
    showing: Showing = Showing(),
) -> list[Triple]:
    """Return what `reconstruct` returns, with these masks."""
    device = next(mae.parameters()).device
    inputs = pixels_to_input(torch.from_numpy(images).to(device), normalization)
    masked, restored = mae.reconstruct(inputs, masks.to(device), paste=showing.paste, crisp=showing.crisp)
    pictures = (
        shown_pixels(input_to_pixels(x, normalization).cpu().numpy(), showing.bands) for x in (masked, restored)
    )
    return list(zip(*pictures, shown_pixels(images, showing.bands), strict=True))


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
    showing: Showing = Showing(),
) -> Block:
    """Return one block of a figure: reconstructions at one mask ratio, titled with the numbers of patches."""
    mask = dataclasses.replace(mae.config.mask, ratio=ratio)
    rows = reconstruct(mae, normalization, images, mask, seed, showing)
    visible, total = dataclasses.replace(mae.config, mask=mask).num_visible, mae.config.num_patches
    title = f"{ratio:.0%} masked: {visible} of {total} patches visible"
    return Block(title=title + _said(mae, showing), rows=rows)


def run(config: ReconstructConfig) -> str:
    """Write the figure, using a model from the registry; return its path or URI."""
    if not config.uri:
        raise UserError("no images are given; try --uri with a prepared dataset or a folder of images")
    output, name = storage_of(config.out)
    remedy = "a picture needs a backbone with its decoder, such as models:/mae-<arch>"
    model = registry.read_model(config.model, "mae.safetensors", remedy=remedy)
    mae, normalization = mae_of(model.values, model.tensors)
    blocks = blocks_of(config, mae, normalization, images_of(config, mae, normalization))
    with TemporaryDirectory() as folder:
        picture = Path(folder) / name
        reconstruction_rows(blocks, picture)
        output.write(name, picture.read_bytes())
        if config.separate:
            for path, block in _separate(name, blocks):
                reconstruction_rows([block], picture)
                output.write(path, picture.read_bytes())
    return output.join(name)


def images_of(config: ReconstructConfig, mae: MaskedAutoencoder, normalization: Normalization) -> NDArray[Any]:
    """Load the images to draw, as the model takes them. Raises UserError if the model lacks a band to show."""
    image_px, channels = mae.config.image_px, mae.config.channels
    if any(band >= channels for band in config.bands):
        raise UserError(f"bands {config.bands} are not all below the model's {channels} channels; count from 0")
    return sample_images(config.uri, config.split, config.num_images, image_px, channels, normalization.values)


def blocks_of(
    config: ReconstructConfig, mae: MaskedAutoencoder, normalization: Normalization, images: NDArray[Any]
) -> list[Block]:
    """Return the blocks of a figure: one per mask ratio, or one for the patches that were chosen to be visible."""
    showing = Showing(bands=config.bands, paste=config.paste, crisp=config.crisp)
    if not config.visible:
        return [picture_block(mae, normalization, images, ratio, config.seed, showing) for ratio in config.shares]
    num_patches = mae.config.num_patches
    masks = chosen_mask(config.visible, num_patches, len(images))
    rows = reconstruct_masked(mae, normalization, images, masks, showing)
    title = f"{len(set(config.visible))} chosen of {num_patches} patches visible"
    return [Block(title=title + _said(mae, showing), rows=rows)]


def _said(mae: MaskedAutoencoder, showing: Showing) -> str:
    """Return what the title must add, so that a picture claims no more than the model predicted."""
    words = [] if showing.paste else ["visible patches predicted too"]
    if showing.crisp and mae.config.target == "norm_pixels":
        words.append("mean and contrast of hidden patches borrowed from the original")
    return "".join(f"; {word}" for word in words)


def _separate(name: str, blocks: Sequence[Block]) -> Iterator[tuple[str, Block]]:
    """Return a path and a block for every image of every block."""
    stem, suffix = Path(name).stem, Path(name).suffix
    for i, block in enumerate(blocks, 1):
        for j, row in enumerate(block.rows, 1):
            yield f"{stem}/mask-{i}-image-{j:03d}{suffix}", Block(title=block.title, rows=[row])


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
