"""`mae bench data` says what it measured, on the user's images, and that our pixels are Pillow's."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.bench.data import DataBenchConfig, run
from pipelines.bench.loading import _Passage


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


def test_wrong_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no readable image in"):
        run(DataBenchConfig(source=tmp_path))
    with pytest.raises(ValueError, match="is not a folder; give a folder of images"):
        run(DataBenchConfig(source=tmp_path / "absent"))
    with pytest.raises(ValueError, match="rounds 0 is below 1; try 1"):
        DataBenchConfig(rounds=0)
    monkeypatch.setenv("MAE_TEST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"imagenet-sample.tar is not there; give a folder of images by --source"):
        run(DataBenchConfig())


def test_waits_between_epochs_are_told_from_others() -> None:
    passage = _Passage([1.0, 2.0, 2.5, 6.0, 6.5, 6.75], batches_per_epoch=3)
    assert (passage.seconds, passage.epoch_gap_s(), passage.batch_gap_s()) == (5.75, 3.5, 1.0)
