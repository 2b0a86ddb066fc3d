"""The page holds all that it shows, says what it does not know, and works in a real browser."""

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tune.report.canvas import new_canvas, separate_labels
from tune.report.charts import charts_of
from tune.report.page import Row, Study, page
from tune.report.pictures import _uris
from tune.results import Entry, best_of, measured_baselines, measured_points

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RATIO, DEPTH = "model.mask.ratio", "model.decoder_depth"


def entries_of(seeds: int = 2, **failed: str) -> list[Entry]:
    found: list[Entry] = []
    for seed in range(seeds):
        for ratio, depth in itertools.product((0.5, 0.75), (1, 4)):
            accuracies = {"finetune": 70 + 8 * ratio + depth + 0.3 * seed, "probe": 50 + 9 * ratio + 0.4 * seed}
            found.append(_entry({RATIO: ratio, DEPTH: depth}, seed, loss=0.5, **accuracies))
        found.append(_entry({}, seed, kind="scratch", finetune=68.0 + seed, probe=40.0 + seed, loss=None))
    return found


def _entry(point: dict[str, Any], seed: int, **values: Any) -> Entry:
    key = f"{values.get('kind', 'mae')}-{point.get(RATIO)}-{point.get(DEPTH)}-{seed}"
    common = {"kind": "mae", "visible": 12, "patches": 49, "duration_s": 90.0, "error": ""}
    return {**common, "key": key, "point": point, "seed": seed, **values}


def study_of(entries: list[Entry], **more: Any) -> Study:
    points, baselines = measured_points(entries), measured_baselines(entries)
    pictures = _uris([np.full((28, 28, 3), 40 * i, np.uint8) for i in range(3)])
    rows = [Row(key="", title="original", pictures=pictures), Row(key="", title="masked", pictures=pictures)]
    rows += [Row(key=point.entries[0]["key"], title=f"point {i}", pictures=pictures) for i, point in enumerate(points)]
    values: dict[str, Any] = {
        "name": "study-1",
        "question": "How do <ratio> & depth matter?",
        "entries": entries,
        "best_key": best_of(entries, "finetune")["key"],
        "select_by": "finetune",
        "tests": {"finetune": [80.0, 81.0], "scratch": [68.0, 69.0], "probe": [57.0, 58.0], "random": [40.0, 41.0]},
        "charts": charts_of(points, baselines),
        "reconstructions": {0.75: rows, 0.8: rows},
        "preset": "kind: pretrain\n",
        "command": "mae sweep --preset mine",
        "facts": {"dataset": "prepared/mine"},
        "links": {entry["key"]: f"http://mlflow/#/runs/{entry['key']}" for entry in entries},
    }
    return Study(**(values | more))


class Reading(HTMLParser):
    """Collect what a page refers to, its ids, and the text of its cells."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of(entries_of())


@pytest.mark.slow
def test_the_page_needs_no_other_file(study: Study) -> None:
    found = Reading(page(study))
    outside = [address for address in found.addresses if not address.startswith(("data:", "#", "http://mlflow/"))]
    assert outside == []
    assert len(found.ids) == len(set(found.ids))
    assert b"@import" not in page(study)
    assert "link" not in found.tags


def test_charts_take_their_colours_from_the_page_and_say_their_values(study: Study) -> None:
    names = [chart.name for chart in study.charts]
    assert names == ["curves-finetune", "curves-probe", "heat-finetune", "heat-probe", "cost", "importance"]
    for chart in study.charts:
        assert chart.png.startswith(b"\x89PNG")
        assert chart.svg.startswith(b"<?xml")
        assert "var(--ink)" in chart.inline
        assert "#1b2026" not in chart.inline
    curves = study.charts[0].inline
    assert "<title>masking ratio (%) 75, decoder depth (blocks) 4: 80.15 ± 1.91 %, 2 seeds, 1.5 min</title>" in curves
    assert "from scratch 68.5" in curves


def test_the_answer_names_the_best_point_and_what_training_from_scratch_reaches(study: Study) -> None:
    text = re.sub(r"<[^>]+>", "", page(study).decode()).replace("\u00a0", " ")
    assert "How do &lt;ratio&gt; &amp; depth matter?" in text
    assert "Best by fine-tuning on val: masking ratio 75 %, decoder depth 4." in text
    assert "it is 11.7 points above training from scratch" in text
    assert "Test was read once" in text
    assert "80.50 ± 6.35 %" in text


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ((70, 60, 50), "Its interval lies above that of every other point."),
        ((70, 69.5, 50), "The intervals of 1 of the other 2 points overlap with its own."),
        ((70, 69.5, 69), "The intervals of all 2 other points overlap with its own."),
        ((70, 69.5), "The interval of the other point overlaps with its own."),
    ],
)
def test_the_answer_says_which_points_the_seeds_do_not_tell_from_the_best(
    accuracies: tuple[float, ...], sentence: str
) -> None:
    entries = [
        _entry({RATIO: 0.5, DEPTH: depth}, seed, finetune=accuracy + 0.5 * seed, probe=50.0, loss=0.5)
        for depth, accuracy in enumerate(accuracies)
        for seed in range(3)
    ]
    assert sentence in page(study_of(entries, tests={})).decode()


@pytest.mark.slow
def test_one_seed_is_called_one_and_failures_and_missing_trials_are_listed() -> None:
    entries = entries_of(seeds=1)
    entries[0] = entries[0] | {"error": "loss is nan", "finetune": None, "probe": None, "loss": None}
    text = page(study_of(entries, num_unrun=3, tests={})).decode()
    assert "One seed per point: differences may be chance" in text
    assert "masking ratio (%) 0.5, decoder depth (blocks) 1, seed 0: loss is nan" in text
    assert "ended before 3 trials" in text
    assert "3 points, 1 seed<" in text
    assert "Test was read once" not in text


def test_trials_that_were_stopped_early_are_listed_with_where_and_why() -> None:
    entries = entries_of(seeds=1)
    entries[0] |= {"stopped": {"epoch": 3, "online": 31.25}, "finetune": None, "probe": None, "loss": None}
    text = page(study_of(entries, tests={})).decode()
    assert "masking ratio (%) 0.5, decoder depth (blocks) 1, seed 0: epoch 3, 31.25 % by the online probe" in text
    assert text.count(">stopped</td>") == 2


def test_a_sweep_over_words_has_curves_and_no_number_axis() -> None:
    entries = [
        _entry({"model.mask.kind": kind}, 0, finetune=70.0 + i, probe=50.0, loss=0.4)
        for i, kind in enumerate(("random", "block", "grid"))
    ]
    charts = charts_of(measured_points(entries), [])
    assert [chart.name for chart in charts] == ["curves-finetune", "curves-probe", "cost"]
    assert all(word in charts[0].inline for word in ("random", "block", "grid"))


def test_labels_of_an_axis_keep_a_distance_and_none_that_fits_is_left_out() -> None:
    canvas = new_canvas()
    labels = [f"random {ratio}" for ratio in range(10, 100, 10)]
    canvas.axes.set_xticks(range(len(labels)), labels)
    separate_labels(canvas)
    canvas.figure.draw_without_rendering()
    shown = [(label.get_text(), label.get_window_extent()) for label in canvas.axes.get_xticklabels()]
    assert [text.strip() for text, _ in shown if text] == labels
    for row in (0, 1):
        boxes = [box for text, box in shown if text.count("\n") == row]
        assert len(boxes) > 1
        assert all(b.x0 - a.x1 > 0 for a, b in itertools.pairwise(boxes))


def screenshot(html: Path, out: Path, width_px: int, *options: str) -> np.ndarray:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={out.parent / 'profile'}", f"--window-size={width_px},1400", *options,
        f"--screenshot={out}", html.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# Run in the page: sorts by fine-tuning, and writes what it sees into the title, which --dump-dom prints.
PROBE = """
<script>
const heads = [...document.querySelectorAll("table.sortable thead th")];
const column = heads.findIndex(head => head.textContent === "fine-tuned");
heads[column].firstElementChild.click();
const values = [...document.querySelectorAll("table.sortable tbody tr")].map(row => row.children[column].textContent);
const wide = [...document.querySelectorAll("body > *, figure, figure svg")].filter(
  one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
const images = [...document.images].filter(image => !image.src.startsWith("data:")).length;
document.title = JSON.stringify({values, wide: wide.length, images, scroll: document.documentElement.scrollWidth});
</script>
"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium; try apt-get install chromium (infra/system_packages.sh)")
def test_a_browser_shows_it_light_and_dark_sorts_its_table_and_fits_a_phone(study: Study, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    html.write_bytes(page(study))
    light = screenshot(html, tmp_path / "light.png", 1200)
    dark = screenshot(html, tmp_path / "dark.png", 1200, "--blink-settings=preferredColorScheme=0")
    # The corner is paper; a fifth of the rows has ink.
    assert light[5, 5].min() > 240
    assert dark[5, 5].max() < 40
    assert (light.min(axis=(1, 2)) < 120).mean() > 0.2
    assert (dark.max(axis=(1, 2)) > 180).mean() > 0.2

    html.write_bytes(page(study) + PROBE.encode())
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,900", "--dump-dom", html.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    title = re.findall(r"<title>(\{.*?\})</title>", dom)
    import json

    seen = json.loads(title[0].replace("&quot;", '"'))
    values = [float(value) for value in seen["values"]]
    assert len(values) == len(study.entries)
    assert values == sorted(values, reverse=True)
    assert (seen["wide"], seen["images"]) == (0, 0)
    assert seen["scroll"] <= 500
