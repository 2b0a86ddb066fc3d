"""Several classes an image: targets, loss and mean average precision as their definitions have them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy

from mae_core.augment import mixup
from mae_core.config import AugmentConfig
from mae_core.multi_label import mean_average_precision, multi_hot, multi_label_loss, targets_of


def test_targets_are_the_classes_of_each_set() -> None:
    hot = multi_hot([(), (1,), (0, 2)], 3)
    assert hot.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert targets_of(torch.tensor([2, 0, -1]), hot)[:2].tolist() == [[1, 0, 1], [0, 0, 0]]


def test_the_loss_is_the_mean_over_classes_summed_over_samples_and_placeholders_count_nothing() -> None:
    logits, targets = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    expected = sum(binary_cross_entropy(logits[i].sigmoid(), targets[i]) for i in (0, 1, 3))
    torch.testing.assert_close(multi_label_loss(logits, targets, weights), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([2, 5, 1000]))
def test_mean_average_precision_is_scikit_learns(num: int, classes: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = rng.integers(0, levels, (num, classes)) / levels, rng.integers(0, 2, (num, classes))
    present = [c for c in range(classes) if targets[:, c].any()]
    expected = np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in present]) if present else 0.0
    found = mean_average_precision(torch.tensor(scores).float(), torch.tensor(targets).float())
    assert found == pytest.approx(expected, abs=1e-6)


def test_given_targets_are_mixed_like_the_images() -> None:
    images, hot = torch.rand(4, 1, 8, 8), multi_hot([(0,), (0, 1), (2,), ()], 3)
    labels = torch.tensor([0, 1, 2, 3])
    config = AugmentConfig(mixup=1.0, cutmix=0.0, label_smoothing=0.1)
    mixed, targets = mixup(images, labels, 3, config, seed=0, step=0, micro=0, targets=targets_of(labels, hot))
    share = ((mixed - images.flip(0)) / (images - images.flip(0)))[0, 0, 0, 0]
    torch.testing.assert_close(targets, share * hot + (1 - share) * hot.flip(0), atol=1e-4, rtol=1e-4)
