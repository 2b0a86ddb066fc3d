import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import nn

from mae_core.segmentation import (
    IGNORE,
    SegmentationHead,
    intersection_over_union,
    pixel_confusion,
    segmentation_loss,
)


def draw(num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, num_classes, (30, 40), generator=generator)
    wrong = torch.rand(30, 40, generator=generator) < 0.4
    return truth, torch.where(wrong, torch.randint(0, num_classes, (30, 40), generator=generator), truth)


def test_truth_against_itself_is_1():
    truth, _ = draw()
    assert intersection_over_union(pixel_confusion(truth, truth, 4)).tolist() == [1, 1, 1, 1]


def test_it_equals_scikit_learns_jaccard_score_of_the_pixels_that_count():
    truth, predicted = draw()
    truth[:5] = IGNORE
    found = intersection_over_union(pixel_confusion(truth, predicted, 4))
    counted = truth != IGNORE
    # The stub of scikit-learn forbids None, which returns one value a class.
    expected = jaccard_score(truth[counted], predicted[counted], average=None)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert pixel_confusion(truth, predicted, 4).sum() == counted.sum()


def test_a_class_that_masks_lack_has_no_value_even_if_it_is_predicted():
    truth, predicted = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    predicted[0] = 2
    found = intersection_over_union(pixel_confusion(truth, predicted, 3))
    assert found[0] == pytest.approx(0.75)
    assert found[1:].isnan().all()


def test_ignored_pixels_change_no_loss():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2, 8, 8))
    masks[:, :4] = IGNORE
    upsampled = nn.functional.interpolate(logits, size=(8, 8), mode="bilinear")
    expected = nn.functional.cross_entropy(upsampled[:, :, 4:], masks[:, 4:])
    torch.testing.assert_close(segmentation_loss(logits, masks), expected)
    assert segmentation_loss(logits, torch.full_like(masks, IGNORE)) == 0


def test_each_patch_is_classified_where_it_lies():
    head = SegmentationHead(3, 2, (2, 3)).eval()
    tokens = torch.randn(1, 6, 3)
    logits = head(tokens)
    assert logits.shape == (1, 2, 2, 3)
    torch.testing.assert_close(logits[0, :, 1, 2], head(tokens[:, 5:].expand(1, 6, 3))[0, :, 0, 0])
