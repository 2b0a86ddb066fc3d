"""Classification with several classes an image: targets, the sum of binary cross-entropies, and mean average precision.

Labels are numbers of sets of classes, so that they travel like those of single classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def multi_hot(label_sets: Sequence[Sequence[int]], num_classes: int) -> Float[Tensor, "sets classes"]:
    """Return a row of 0 and 1 for each set of classes."""
    rows = torch.zeros(len(label_sets), num_classes)
    for row, classes in zip(rows, label_sets):
        row[list(classes)] = 1
    return rows


def targets_of(labels: Int64[Tensor, "batch"], hot: Float[Tensor, "sets classes"]) -> Float[Tensor, "batch classes"]:
    """Return the targets of a micro-batch; those of placeholders (label -1) do not matter, since their weight is 0."""
    return hot[labels.clamp(min=0)]


def multi_label_loss(
    logits: Float[Tensor, "batch classes"],
    targets: Float[Tensor, "batch classes"],
    weights: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Sum the samples' binary cross-entropies, each the mean over classes, weighted; placeholders have weight 0."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses.mean(dim=1) * weights).sum()


def mean_average_precision(scores: Float[Tensor, "n classes"], targets: Float[Tensor, "n classes"]) -> float:
    """Return the mean over classes of the area below precision and recall, from 0 to 1, as scikit-learn computes it.

    Equal scores are one threshold. Classes without a positive image are left out; without any, the result is 0.
    """
    found = [_average_precision(s, t) for s, t in zip(scores.double().T, targets.double().T) if t.sum() > 0]
    return float(sum(found) / len(found)) if found else 0.0


def _average_precision(scores: Float[Tensor, "n"], targets: Float[Tensor, "n"]) -> float:
    order = torch.argsort(scores, descending=True, stable=True)
    scores, hits = scores[order], targets[order].cumsum(0)
    ends = torch.ones_like(scores, dtype=torch.bool)
    ends[:-1] = scores[1:] != scores[:-1]
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    precision, recall = (hits / ranks)[ends], (hits / hits[-1])[ends]
    return float((precision * torch.diff(recall, prepend=recall.new_zeros(1))).sum())
