"""RankMe, the effective rank of embeddings, as a measure of an encoder that needs no labels (Garrido et al. 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor

from mae_core.errors import UserError


def rankme(embeddings: Float[Tensor, "images features"]) -> float:
    """Return the exponential of the entropy of the singular values, scaled so that they sum to 1.

    It is 1 if all embeddings are multiples of one vector, and min(images, features) if all singular values are equal.
    The embeddings are not centred, as in the paper, whose small constant for zeros is not needed here. Values compare
    only for equal numbers of images and features. Raises UserError if a value is not finite, or if all are 0.
    """
    values = embeddings.double()
    if not (values.isfinite().all() and values.any()):
        raise UserError("the embeddings are all 0 or not finite, so that they have no rank; check the training loss")
    singular = torch.linalg.svdvals(values)
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
