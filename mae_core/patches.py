"""Images as sequences of patches whose values are in the reference's order: row, column, channel (section 3)."""

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mae_core.config import Size, patch_grid


def patchify(images: Shaped[Tensor, "batch channels height width"], patch_px: int) -> Shaped[Tensor, "batch num dim"]:
    """Split images into patches, row by row; dim is patch_px * patch_px * channels."""
    return _patch_view(images, patch_px).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Shaped[Tensor, "batch num dim"], grid: Size, patch_px: int, channels: int
) -> Shaped[Tensor, "batch channels height width"]:
    """Assemble images from all their patches: the inverse of `patchify`. `grid` is (rows, columns)."""
    rows, columns = grid
    cells = patches.reshape(-1, rows, columns, patch_px, patch_px, channels)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch_px, columns * patch_px)


def gather(
    tokens: Shaped[Tensor, "batch num dim"], ids: Int64[Tensor, "batch chosen"]
) -> Shaped[Tensor, "batch chosen dim"]:
    """Select each sample's tokens at `ids`."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def gather_patches(
    images: Shaped[Tensor, "batch channels height width"], ids: Int64[Tensor, "batch chosen"], patch_px: int
) -> Shaped[Tensor, "batch chosen dim"]:
    """Compute `gather(patchify(images), ids)` without copying the other patches."""
    cells = _patch_view(images, patch_px)
    num_columns = cells.shape[2]
    samples = torch.arange(len(images), device=ids.device)[:, None]
    return cells[samples, ids // num_columns, ids % num_columns].flatten(2)


def _patch_view(images: Tensor, patch_px: int) -> Tensor:
    """View the images as [batch, row, column, patch_px, patch_px, channels], without a copy."""
    batch, channels, height_px, width_px = images.shape
    rows, columns = patch_grid((height_px, width_px), patch_px)
    return images.reshape(batch, channels, rows, patch_px, columns, patch_px).permute(0, 2, 4, 3, 5, 1)
