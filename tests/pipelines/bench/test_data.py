"""`mae bench data` says what it measured, on the user's images, and that our pixels are Pillow's."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.bench.data import DataBenchConfig, run
from pipelines.bench.loading import _Pass
from pipelines.bench.variants import only_cores

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photographs of 300 x 260, some with metadata, and what is none."""
    rows, columns = np.mgrid[0:260, 0:300]
    for number in range(6):
        waves = [np.sin(rows / (9 + number)) + np.cos(columns / (7 + c)) for c in range(3)]
        file = io.BytesIO()
        pixels = (np.stack(waves, axis=2) * 50 + 120).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=("4:2:0", "4:4:4")[number % 2])
        (tmp_path / f"{number}.jpg").write_bytes(file.getvalue())
    (tmp_path / "broken.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    return tmp_path


@pytest.mark.slow
def test_figures_on_a_folder(folder: Path) -> None:
    found = run(DataBenchConfig(source=folder, rounds=2, whole_path=False))
    assert found["num_images"] == 6
    assert found["psnr_db"] >= 60
    assert found["mean_difference"] < 0.1
    assert found["contenders"]["sliced"]["bytes_ratio"] <= 1.02
    for name in ("images_per_s_per_core", "ratio_vs_pil", "ratio_vs_torchvision_io", "prepare_ms"):
        assert found[name] > 0
    text = found.pop("text")
    assert "torchvision transforms on PIL" in text
    assert "a GPU that trains on 1500 images/s needs" in text
    json.dumps(found)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_whole_path_is_measured_on_a_folder(folder: Path) -> None:
    """In a process of its own, whose Ray inherits the S3 server's address."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "bench", "data", "--json"]
    sizes = ["--source", str(folder), "--rounds", "1", "--epoch-images", "100", "--cores", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
    done = subprocess.run([*command, *sizes], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = ("ratio_vs_dataloader", "share_of_bare_decode", "wall_share_of_bare_decode", "first_batch_s", "epoch_gap_s")
    assert all(found[name] > 0 for name in (*names, "images_per_core_s", "store_share")), found
    assert found["share_of_bare_decode"] < 1.5
    assert found["cores"] == 1


def test_more_cores_than_there_are_cannot_be_shared() -> None:
    with (
        pytest.raises(ValueError, match=r"cores 9999 is more than the \d+ that this process may use"),
        only_cores(9999),
    ):
        pass
    before = os.sched_getaffinity(0)
    with only_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_wrong_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no readable image in"):
        run(DataBenchConfig(source=tmp_path))
    with pytest.raises(ValueError, match="is not a folder; give a folder of images"):
        run(DataBenchConfig(source=tmp_path / "absent"))
    with pytest.raises(ValueError, match="rounds 0 is below 1; try 1"):
        DataBenchConfig(rounds=0)
    monkeypatch.setenv("MAE_TEST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"imagenet-sample.tar does not exist; give a folder of images by --source"):
        run(DataBenchConfig())


def test_waits_between_epochs_are_told_from_others() -> None:
    one_pass = _Pass([1.0, 2.0, 2.5, 6.0, 6.5, 6.75], batches_per_epoch=3)
    assert (one_pass.seconds, one_pass.epoch_gap_s(), one_pass.batch_gap_s()) == (5.75, 3.5, 1.0)
