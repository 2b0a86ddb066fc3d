"""A kNN classifier on frozen features, weighted by similarity (Wu et al. 2018; as in DINO, Caron et al. 2021).

It trains nothing, and says little of MAE: its features are not shaped to be compared by angle, so that a backbone that
fine-tunes well can have poor neighbours.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mae_core.errors import UserError

_MAX_SCORES = 2**26


def knn_probabilities(
    queries: Float[Tensor, "queries features"],
    bank: Float[Tensor, "bank features"],
    labels: Int64[Tensor, "bank"],
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
) -> Float[Tensor, "queries classes"]:
    """Return each query's share of votes per class.

    1. Scale all features to length 1.
    2. Find the nearest of the bank by cosine similarity s; exactly, by comparing with all of it.
    3. Let each neighbour vote for its label with weight exp(s / temperature).

    Raises UserError if the bank holds fewer than `num_neighbours`.
    """
    if num_neighbours > len(bank):
        raise UserError(f"num_neighbours {num_neighbours} exceeds the {len(bank)} training images; try {len(bank)}")
    directions = normalize(bank, dim=1)
    votes = []
    for some in queries.split(max(1, _MAX_SCORES // len(bank))):
        similarity, nearest = (normalize(some, dim=1) @ directions.T).topk(num_neighbours, dim=1)
        # Softmax is the same weights, scaled so that they sum to 1.
        weights = (similarity / temperature).softmax(1)
        votes.append((one_hot(labels[nearest], num_classes) * weights[..., None]).sum(1))
    return torch.cat(votes)
