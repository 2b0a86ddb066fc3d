"""A linear probe whose optimum is computed instead of trained, so that it needs no schedule and no seed.

1. Normalize each feature by its mean and variance over all examples, as a BatchNorm without affine does over a batch.
2. Minimize mean cross-entropy + `weight_decay` / 2 * squared norm of the weights by L-BFGS, from zero, in float64.

The objective is strictly convex in the weights, so that the result depends on the examples alone. The price: all
features must be in memory, and they are those of one fixed view of each image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mae_core.classifier import ProbeHead

_MAX_ITERATIONS = 200


def fit_linear_probe(
    features: Float[Tensor, "examples features"],
    labels: Int64[Tensor, "examples"],
    *,
    num_classes: int,
    weight_decay: float,
) -> ProbeHead:
    """Fit a linear classifier to frozen features; return it in evaluation mode, on their device."""
    with torch.random.fork_rng(devices=[]):  # Its random weights, which are replaced below, change no other draw.
        head = ProbeHead(features.shape[1], num_classes)
    head.to(features.device).requires_grad_(False).eval()
    values = features.double()
    mean, var = values.mean(0), values.var(0, unbiased=False)
    head.running_mean.copy_(mean)
    head.running_var.copy_(var)
    normalized = (values - mean) * torch.rsqrt(var + head.eps)
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(normalized, weight, bias), labels)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    head.head.weight.copy_(weight.detach())
    head.head.bias.copy_(bias.detach())
    return head
