"""Fixed positions of patches."""

import torch
from jaxtyping import Float32
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError

_TEMPERATURE = 10_000


def sincos_2d(width: int, grid: Size, *, class_token: bool) -> Float32[Tensor, "tokens width"]:
    """Sine-cosine positions of a grid's patches row by row, after a row of zeros for the class token.

    The first half of a position encodes the column, the second the row: the reference's order, which its published
    weights depend on, though one would expect the row first.
    """
    if width % 4:
        raise UserError(f"a width of {width} has no 2-D sine-cosine positions; try {width + 4 - width % 4}")
    rows, columns = grid
    frequency = _TEMPERATURE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    by_column, by_row = column[:, None] * frequency, row[:, None] * frequency
    table = torch.cat([by_column.sin(), by_column.cos(), by_row.sin(), by_row.cos()], dim=1).float()
    return torch.cat([torch.zeros(1, width), table]) if class_token else table
