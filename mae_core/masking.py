"""Masks: patches hidden uniformly at random, in blocks, or on a grid (section 3, Figure 6)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from mae_core.config import MaskConfig, ModelConfig, Size
from mae_core.errors import UserError
from mae_core.random_tensors import hash64, uniform
from mae_core.randomness import Purpose

# Block masks after BEiT (Bao et al. 2021, Algorithm 1): its rectangles cover at least 16 of 196 patches and are at most
# 1 / 0.3 times as long as wide. Sixteen of them cover any requested share of the image in all but rare cases.
_BLOCK_MIN_AREA = 16 / 196
_BLOCK_MIN_ASPECT = 0.3
_NUM_BLOCKS = 16


@dataclass(frozen=True)
class Mask:
    """The visible and the hidden patches of every sample, each in ascending order of position.

    If a step predicts only some of the hidden patches, they come last: `hidden_ids[:, predicted_from:]`, ascending like
    those before them.
    """

    visible_ids: Int64[Tensor, "batch visible"]
    hidden_ids: Int64[Tensor, "batch hidden"]
    predicted_from: int = 0

    @property
    def predicted_ids(self) -> Int64[Tensor, "batch predicted"]:
        """Hidden patches to predict; all of them unless some were chosen."""
        return self.hidden_ids[:, self.predicted_from :]

    @property
    def num_patches(self) -> int:
        return self.visible_ids.shape[1] + self.hidden_ids.shape[1]

    def is_hidden(self) -> Bool[Tensor, "batch num"]:
        """Mark the hidden patches."""
        hidden = torch.zeros(len(self.hidden_ids), self.num_patches, dtype=torch.bool, device=self.hidden_ids.device)
        return hidden.scatter_(1, self.hidden_ids, True)

    def to(self, device: torch.device | str) -> "Mask":
        """Copy the mask to another device."""
        return dataclasses.replace(self, visible_ids=self.visible_ids.to(device), hidden_ids=self.hidden_ids.to(device))


def mask_from_noise(noise: Shaped[Tensor, "batch num"], num_visible: int) -> Mask:
    """Keep the `num_visible` patches with the least noise visible; on ties, the earlier one."""
    order = noise.argsort(dim=1, stable=True)
    return Mask(order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values)


def sample_masks(
    config: MaskConfig, grid: Size, *, seed: int, epoch: int, sample_ids: Int64[Tensor, "batch"], view: int = 0
) -> Mask:
    """Draw one mask per sample from (seed, epoch, sample id, view); all hide the same number of patches."""
    if config.kind == "grid":
        noise, visible = _grid_noise(config.grid_cell(), grid, sample_ids)
    else:
        visible = config.num_visible(grid[0] * grid[1])
        if config.kind == "block":
            noise = _block_noise(grid, visible, seed, epoch, sample_ids, view)
        else:
            noise = _cell_noise(grid, config.cell, seed, epoch, sample_ids, view)
    return mask_from_noise(noise, visible)


def random_masks(
    grid: Size, num: int, *, ratio: float = 0.75, seed: int = 0, kind: Literal["random", "block", "grid"] = "random"
) -> Mask:
    """Draw masks for `num` images of `grid` patches (rows, columns); the same seed gives the same masks.

    int(patches * (1 - ratio)) patches stay visible: 49 of 196 at 0.75, 39 at 0.8. Raises UserError if the ratio is
    outside (0, 1), or if a grid mask cannot have it.
    """
    return sample_masks(MaskConfig(kind=kind, ratio=ratio), grid, seed=seed, epoch=0, sample_ids=torch.arange(num))


def chosen_mask(visible: Sequence[int], num_patches: int, num: int) -> Mask:
    """Return a mask, the same for `num` images, that leaves these patches visible, counted row by row from 0.

    Raises UserError if there is no such patch, or if none stays visible or hidden.
    """
    wrong = [i for i in visible if not 0 <= i < num_patches]
    if wrong or not 0 < len(set(visible)) < num_patches:
        found = f"patch {wrong[0]} does not exist" if wrong else f"{len(set(visible))} patches are visible"
        raise UserError(
            f"{found}, but the model has patches 0 to {num_patches - 1}, of which some must be visible and some hidden"
        )
    noise = torch.ones(1, num_patches, dtype=torch.int64)
    noise[0, list(visible)] = 0
    return mask_from_noise(noise.expand(num, -1), len(set(visible)))


def training_masks(
    config: ModelConfig,
    *,
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, "batch"],
    masks_per_image: int = 1,
    complementary: bool = False,
) -> Mask:
    """Draw the masks of one training step and choose the patches to predict.

    Row `view * batch + i` is the mask of sample i. Masks of different views of a sample are independent, as those of
    different epochs are. With `complementary` no two views of a sample see the same patch, and together they see all;
    the first is the one that it would be without.
    """
    if complementary:
        masks = _complementary_masks(config, seed, epoch, sample_ids, masks_per_image)
    else:
        masks = [
            sample_masks(config.mask, config.grid, seed=seed, epoch=epoch, sample_ids=sample_ids, view=view)
            for view in range(masks_per_image)
        ]
    views = []
    for view, mask in enumerate(masks):
        if config.predicted_share < 1:
            noise = hash64(seed, Purpose.PREDICT, epoch, sample_ids[:, None], view, mask.hidden_ids)
            mask = choose_predicted(mask, noise, config.num_predicted)
        views.append(mask)
    if masks_per_image == 1:
        return views[0]
    visible_ids, hidden_ids = torch.cat([v.visible_ids for v in views]), torch.cat([v.hidden_ids for v in views])
    return dataclasses.replace(views[0], visible_ids=visible_ids, hidden_ids=hidden_ids)


def _complementary_masks(config: ModelConfig, seed: int, epoch: int, sample_ids: Tensor, num: int) -> list[Mask]:
    """Split the patches of each sample, in random order, into as many visible sets as there are masks."""
    visible, patches = config.num_visible, config.num_patches
    assert num * visible == patches, "the config checks that the visible sets are all patches"
    noise = _cell_noise(config.grid, config.mask.cell, seed, epoch, sample_ids, view=0)
    order = noise.argsort(dim=1, stable=True)
    masks = []
    for first in range(0, patches, visible):
        last = first + visible
        hidden = torch.cat([order[:, :first], order[:, last:]], dim=1)
        masks.append(Mask(order[:, first:last].sort(dim=1).values, hidden.sort(dim=1).values))
    return masks


def choose_predicted(mask: Mask, noise: Shaped[Tensor, "batch hidden"], num_predicted: int) -> Mask:
    """Predict only the `num_predicted` hidden patches with the most noise."""
    first = mask.hidden_ids.shape[1] - num_predicted
    shuffled = mask.hidden_ids.gather(1, noise.argsort(dim=1, stable=True))
    parts = shuffled[:, :first].sort(dim=1).values, shuffled[:, first:].sort(dim=1).values
    return dataclasses.replace(mask, hidden_ids=torch.cat(parts, dim=1), predicted_from=first)


def _cell_noise(grid: Size, cell: int, seed: int, epoch: int, sample_ids: Tensor, view: int) -> Tensor:
    """Draw noise for each square of cell x cell patches, the same for all of them; the rank of a cell is unique."""
    rows, columns = grid[0] // cell, grid[1] // cell
    positions = torch.arange(rows * columns, device=sample_ids.device)
    noise = hash64(seed, Purpose.MASK, epoch, sample_ids[:, None], view, positions)
    if cell == 1:
        return noise
    # Ranks differ even where noise does not, so that no cell is cut by a tie.
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1).unflatten(1, (rows, columns))
    return rank.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def _block_noise(grid: Size, visible: int, seed: int, epoch: int, sample_ids: Tensor, view: int) -> Tensor:
    """Hide rectangles one after another until enough patches are hidden; the last is cut short along its rows.

    A patch's rank is the first rectangle that covers it. Within a rank patches are taken in reading order, for half of
    the samples from the end, so that the part cut off to reach the exact count is also a piece of a block.
    """
    rows, columns = grid
    num_patches = rows * columns
    blocks = torch.arange(_NUM_BLOCKS, device=sample_ids.device)

    def draw(what: int) -> Tensor:
        return uniform(seed, Purpose.MASK, epoch, sample_ids[:, None], view, blocks, what)

    least = min(_BLOCK_MIN_AREA * num_patches, num_patches - visible)
    area = least + draw(0) * (num_patches - visible - least)
    aspect = torch.exp((2 * draw(1) - 1) * log(_BLOCK_MIN_ASPECT))
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (draw(2) * (rows - height + 1)).floor()
    left = (draw(3) * (columns - width + 1)).floor()

    row = torch.arange(rows, device=sample_ids.device)
    column = torch.arange(columns, device=sample_ids.device)
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    covers = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)
    rank = torch.where(covers, blocks[:, None], _NUM_BLOCKS).amin(dim=1)

    scan = torch.arange(num_patches, device=sample_ids.device)
    from_end = hash64(seed, Purpose.MASK, epoch, sample_ids[:, None], view, _NUM_BLOCKS) < 0
    scan = torch.where(from_end, num_patches - 1 - scan, scan)
    return -(rank * num_patches + scan)


def _grid_noise(cell: int, grid: Size, sample_ids: Tensor) -> tuple[Tensor, int]:
    """Keep the first patch of every cell visible, for every sample and epoch."""
    row = torch.arange(grid[0], device=sample_ids.device)[:, None]
    column = torch.arange(grid[1], device=sample_ids.device)
    is_hidden = ((row % cell != 0) | (column % cell != 0)).flatten().to(torch.int64)
    return is_hidden.expand(len(sample_ids), -1), (grid[0] // cell) * (grid[1] // cell)
