"""`mae bench prepare` measures every variant in a process of its own, and says what fails there."""

from pathlib import Path

import pytest

from mae_core.errors import UserError
from pipelines.bench.config import PrepareBenchConfig
from pipelines.bench.preparing import run
from pipelines.errors import CommandFailed


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
def test_rates_and_processor_time_of_one_core_and_of_two(few: Path) -> None:
    found = run(PrepareBenchConfig(source=few, num_images=40, rounds=1))
    assert set(found["images_per_s"]) == set(found["cpu_ms_per_image"]) == {"one", "ours"}
    assert all(rate > 0 for rate in [*found["images_per_s"].values(), *found["cpu_ms_per_image"].values()])
    assert found["speed_up"] == pytest.approx(found["images_per_s"]["ours"] / found["images_per_s"]["one"])
    assert "from 1 to 2 cores" in found["text"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no readable image in .*; give a folder that has images"):
        run(PrepareBenchConfig(source=tmp_path))


@pytest.mark.slow
def test_a_variant_that_fails_says_why(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.bench.preparing._OURS", "raise SystemExit('no such thing')")
    with pytest.raises(CommandFailed, match="mae prepare, 1 core: no such thing"):
        run(PrepareBenchConfig(source=few, num_images=4, rounds=1))
