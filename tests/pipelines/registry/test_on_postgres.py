"""An MLflow server on a real Postgres: a race of promotions, and what a person sees in its pages."""

import dataclasses
import html
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines.config import PromoteConfig
from pipelines.dataset.manifest import Manifest
from pipelines.promotion.promote import promote
from pipelines.registry import ModelRef, Tracking, open_tracking, register_classifier
from tests.pipelines.handoff.conftest import register
from tests.pipelines.promotion.test_promote import classifier_files
from tests.pipelines.registry.racing import check_race
from tests.services import services, skip_without_postgres
from tests.waiting import JOB_DEADLINE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

NAME = "tiles-classifier"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIGURE_BLUE = (31, 95, 168)
"""Of an interval that meets its bound, in gains.png."""
Tiles = tuple[str, Manifest]


@pytest.fixture(scope="module")
def tracking() -> Iterator[Tracking]:
    """Open an MLflow of two processes on a Postgres of its own, which MLFLOW_TRACKING_URI names meanwhile."""
    skip_without_postgres()
    with tempfile.TemporaryDirectory(prefix="mae-postgres-") as scratch, pytest.MonkeyPatch.context() as patch:
        root = Path(scratch)
        root.chmod(0o711)  # Postgres has a user of its own if we are root.
        postgres = services().Postgres(root / "postgres")
        postgres.create()
        mlflow = services().Mlflow(root / "mlflow", postgres.uri, str(root / "artifacts"), {}, num_workers=2)
        try:
            for server in (postgres, mlflow):
                server.start()
                server.wait()
            patch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
            yield open_tracking("mae")
        finally:
            mlflow.kill()
            postgres.stop()


@pytest.fixture(scope="module")
def versions(tracking: Tracking) -> list[ModelRef]:
    """Register a backbone, and of it a classifier that is always wrong and one that is always right."""
    backbone = register(tracking, "pretraining")
    run = tracking.run("finetuning", "finetune", {}, tags={"mae.dataset_digest": "d" * 64})
    found = [register_classifier(run, classifier_files("vit_pico_patch4", sign), backbone, NAME) for sign in (-1, 1)]
    run.finish()
    return found


def test_of_fifty_promotions_at_once_one_wins_and_all_others_are_told_by_whom(
    tracking: Tracking, versions: list[ModelRef]
) -> None:
    check_race(tracking, NAME, "raced", 50)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium; try apt-get install chromium (infra/system_packages.sh)")
def test_a_person_finds_aliases_tags_lineage_and_pictures_in_the_pages_of_mlflow(
    tracking: Tracking, versions: list[ModelRef], tiles: Tiles, tmp_path: Path
) -> None:
    bad, good = (ref.uri.removeprefix("models:/") for ref in versions)
    config = PromoteConfig(output=str(tmp_path / "runs"), force=True, why="the first of all")
    promote(bad, config)
    gated = dataclasses.replace(config, gate="classifier_gate", data=(tiles[0],), force=False, why="best on tiles")
    run = f"{tracking.uri}/#/experiments/{tracking.experiment_id}/runs/{promote(good, gated)['run_id']}"

    version = Page(f"{tracking.uri}/#/models/{NAME}/versions/2", tmp_path / "version.png")
    assert "@ candidate @ champion" in version.text
    assert "Source Run : finetuning" in version.text
    assert f"mae.parent {versions[1].tags['mae.parent']}" in version.text
    assert "mae.champion.why best on tiles" in version.text

    gate = Page(run, tmp_path / "gate.png")
    assert "mae.verdict : passed" in gate.text
    assert all(f"{NAME} v{number}" in gate.text for number in (1, 2))
    assert "data/all/gain_low 100" in gate.text

    picture = Page(f"{run}/artifacts/gains.png", tmp_path / "picture.png")
    assert '<img alt="gains.png" src="blob:' in picture.html
    for page in (version, gate, picture):
        assert num_colours(page.screenshot) > 50
    # The figure's own blue is in the page with it, and in no other.
    assert has_colour(picture.screenshot, FIGURE_BLUE)
    assert not has_colour(gate.screenshot, FIGURE_BLUE)


class Page:
    """What a browser makes of an address: HTML, its text as a person reads it, and a screenshot."""

    def __init__(self, address: str, screenshot: Path) -> None:
        assert BROWSER is not None
        # The virtual time passes only while no request is under way.
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--virtual-time-budget=30000",
            f"--user-data-dir={screenshot.parent / 'profile'}", "--window-size=1400,1400", "--dump-dom",
            f"--screenshot={screenshot}", address,
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=JOB_DEADLINE_S)
        self.html, self.screenshot = done.stdout, screenshot
        spoken = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", self.html, flags=re.DOTALL)
        self.text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", spoken)).split())


def num_colours(picture: Path) -> int:
    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(2**24) or ())


def has_colour(picture: Path, colour: tuple[int, int, int]) -> bool:
    with Image.open(picture) as image:
        return any(found == colour for _, found in image.convert("RGB").getcolors(2**24) or ())
