"""Figures of classifiers are drawn for any number of classes and any names."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.classifier_figures import confusion_figure, reliability_figure


@pytest.mark.parametrize("num_classes", [1, 2, 26, 61, 300])
def test_a_confusion_figure_has_a_readable_size(num_classes: int) -> None:
    counts = np.diag(np.arange(num_classes))
    names = [rf"class ${i}^{{x}} \frac of a very long name" for i in range(num_classes)]
    picture = Image.open(io.BytesIO(confusion_figure(counts, names, "$x$ on val")))
    assert 500 < picture.width < 2000
    assert 500 < picture.height < 2000


def test_empty_bins_are_left_blank() -> None:
    counts = np.array([0, 3, 0])
    share = np.array([np.nan, 0.5, np.nan])
    drawn = reliability_figure(counts, share, share, 0.0, "")
    assert Image.open(io.BytesIO(drawn)).width > 500
