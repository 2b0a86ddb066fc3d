import numpy as np
import pytest
import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.rankme import rankme


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_equal_singular_values_count_as_their_number(rank: int) -> None:
    left, right = torch.linalg.qr(draw(40, rank)).Q, torch.linalg.qr(draw(12, rank, seed=1)).Q
    assert rankme(5 * left @ right.T) == pytest.approx(rank, rel=1e-4)


def test_embeddings_that_collapsed_to_one_direction_have_rank_one() -> None:
    assert rankme(draw(30, 1) @ draw(1, 8, seed=1)) == pytest.approx(1, abs=1e-4)


def test_unequal_singular_values_count_by_their_entropy() -> None:
    """The shares are 1/2, 1/4 and 1/4, whose entropy is 1.5 bits."""
    assert rankme(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5)


def test_it_is_the_papers_formula() -> None:
    embeddings = draw(50, 16) @ torch.diag(torch.logspace(0, -3, 16))
    singular = np.linalg.svd(embeddings.numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert rankme(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_scale_rotation_and_order_change_nothing() -> None:
    embeddings, rotation = draw(30, 6), torch.linalg.qr(draw(6, 6, seed=1)).Q
    other = 7 * (embeddings @ rotation)[torch.randperm(30, generator=torch.Generator().manual_seed(2))]
    assert rankme(other) == pytest.approx(rankme(embeddings), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_embeddings_without_a_rank_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="all 0 or not finite"):
        rankme(torch.full((4, 3), value))
