"""Position embeddings of patches: the fixed table, and resizing of any table to another grid."""

import torch
from jaxtyping import Float, Float32
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError

_TEMPERATURE = 10_000
_ROUNDED = 3e-4
"""Largest difference by which a table in float16 differs from the sine-cosine one."""


def sincos_2d(width: int, grid: Size, *, class_tokens: int) -> Float32[Tensor, "tokens width"]:
    """Compute sine-cosine embeddings of a grid's patches, row by row; those of class tokens, first, are zero.

    The first half of an embedding encodes the column, the second the row. This is the reference's order, which its
    published weights depend on. Raises UserError if `width` is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"a width of {width} has no 2-D sine-cosine positions; try {width + 4 - width % 4}")
    rows, columns = grid
    frequency = _TEMPERATURE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    by_column, by_row = column[:, None] * frequency, row[:, None] * frequency
    table = torch.cat([by_column.sin(), by_column.cos(), by_row.sin(), by_row.cos()], dim=1).float()
    return torch.cat([torch.zeros(class_tokens, width), table])


def resized(
    table: Float[Tensor, "1 tokens width"], old: Size, new: Size, class_tokens: int = 1
) -> Float[Tensor, "1 new_tokens width"]:
    """Resize a position table from grid `old` to grid `new`, both (rows, columns); class tokens come first.

    A sine-cosine table becomes that of the new grid. Any other, learned or fine-tuned, is interpolated bicubically over
    rows and columns, as in timm; its class tokens are unchanged. Raises UserError if the table is not of grid `old`.
    """
    if table.shape[1] != class_tokens + old[0] * old[1]:
        tokens = "a class token" if class_tokens == 1 else f"{class_tokens} class tokens"
        raise UserError(
            f"the position table has {table.shape[1]} rows, but {tokens} and {old[0]} x {old[1]} patches need "
            f"{class_tokens + old[0] * old[1]}; give the image size that the weights were trained at"
        )
    if new == old:
        return table
    fixed = sincos_2d(table.shape[2], old, class_tokens=class_tokens).to(table)
    if (table[0] - fixed).abs().max() <= _ROUNDED:
        return sincos_2d(table.shape[2], new, class_tokens=class_tokens)[None].to(table)
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=class_tokens)
