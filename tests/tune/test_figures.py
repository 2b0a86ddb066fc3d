"""The figure has every value legibly: text over no other text and over no marker, whatever the sweep found."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from tune.figures import masking_ratio_figure

BASELINES = {"finetune": 67.2, "probe": 74.0}


def point(ratio: float, depth: int, finetune: float | None, probe: float | None, **more: float) -> dict[str, object]:
    return {"ratio": ratio, "decoder_depth": depth, "finetune": finetune, "probe": probe, **more}


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


def texts(axes) -> list[str]:
    return sorted(text.get_text() for text in axes.texts)


def test_fine_tuning_is_above_and_linear_probing_below_on_one_axis(tmp_path, drawn):
    points = [point(r, d, 70 + 10 * r, 60 + 9 * r) for r, d in itertools.product((0.5, 0.75), (1, 4))]
    masking_ratio_figure(points, tmp_path / "a.png", BASELINES)
    upper, lower = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (upper, lower)] == ["fine-tuning", "linear probing"]
    assert upper.get_position().y0 > lower.get_position().y1
    assert upper.get_xlim() == lower.get_xlim()
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["50", "75"]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["decoder of 1 block", "decoder of 4 blocks"]


def test_every_value_and_baseline_is_written(tmp_path, drawn):
    masking_ratio_figure([point(0.5, 4, 75.25, 77.0), point(0.75, 4, 76.4, 80.8)], tmp_path / "a.png", BASELINES)
    upper, lower = drawn[0].axes
    assert texts(upper) == ["75.2", "76.4", "from\nscratch\n67.2"]
    assert texts(lower) == ["77.0", "80.8", "random\nencoder\n74.0"]


def test_intervals_are_drawn_and_said(tmp_path, drawn):
    ends = {"finetune_low": 70.0, "finetune_high": 79.0}
    baseline = {"finetune": 60.0, "finetune_low": 40.0, "finetune_high": 64.0}
    points = [point(0.5, 4, 75.0, None, **ends), point(0.75, 4, 76.0, None)]
    masking_ratio_figure(points, tmp_path / "a.png", baseline, "Bars are intervals.")
    (axes,) = drawn[0].axes
    bars = [line.get_ydata() for line in axes.lines if line.get_marker() == "_"]
    assert np.array_equal(bars, [[70.0, 79.0]])
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (40.0, 64.0)
    assert axes.get_ylim()[0] < 40.0
    assert axes.get_xlabel().splitlines() == ["masking ratio (%)", "Bars are intervals."]


def test_a_measure_that_no_trial_has_gets_no_panel(tmp_path, drawn):
    masking_ratio_figure([point(0.5, 4, None, 77.0), point(0.75, 1, None, None)], tmp_path / "a.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["linear probing"]


def test_no_result_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no trial has a result"):
        masking_ratio_figure([point(0.5, 4, None, None)], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_png_of_the_same_size_every_time(tmp_path):
    for name, points in {"a": [point(0.75, 4, 76.4, 80.8)], "b": [point(r, 1, 50 + r, 50) for r in (0.1, 0.9)]}.items():
        masking_ratio_figure(points, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (1080, 1080)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_text_covers_another_or_a_marker(data, tmp_path_factory):
    ratios = data.draw(st.sampled_from([(0.75,), (0.5, 0.75), (0.1, 0.3, 0.5, 0.75, 0.9)]))
    depths = data.draw(st.sampled_from([(4,), (1, 4), (1, 2, 8)]))
    spread = data.draw(st.sampled_from([0.05, 1.0, 20.0]))
    values = st.floats(70 - spread, 70 + spread)
    points = [point(r, d, data.draw(values), data.draw(values)) for r in ratios for d in depths]
    baselines = data.draw(st.sampled_from([None, {"finetune": 69.0, "probe": 60.0}]))
    with pytest.MonkeyPatch.context() as patch:
        figures: list[Figure] = []
        patch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
        masking_ratio_figure(points, tmp_path_factory.mktemp("f") / "a.png", baselines)
    (figure,) = figures
    figure.draw_without_rendering()
    for axes, measure in zip(figure.axes, ("finetune", "probe")):
        boxes = [text.get_window_extent().padded(-1) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        markers = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() not in ("None", "_")])
        dots = axes.transData.transform(markers)
        assert not any(box.contains(*dot) for box in boxes for dot in dots)
        # Every value is written but one; markers that coincide and read the same need no more than one text.
        told_apart = {(p["ratio"], f"{p[measure]:.1f}") for p in points}
        values = [text for text in axes.texts if isinstance(text, Annotation) and "\n" not in text.get_text()]
        written = {(text.xy[0], text.get_text()) for text in values}
        assert len(written) >= len(told_apart) - 1
