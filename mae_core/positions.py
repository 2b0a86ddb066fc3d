"""Fixed position embeddings of patches."""

import torch
from jaxtyping import Float32
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError

_TEMPERATURE = 10_000


def sincos_2d(width: int, grid: Size, *, class_token: bool) -> Float32[Tensor, "tokens width"]:
    """Compute sine-cosine embeddings of a grid's patches, row by row; the class token's, first, is zero.

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
    return torch.cat([torch.zeros(1, width), table]) if class_token else table
