"""Losses are the model's, ranked, and the lists hold training images of both ends."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mae_core.augment import pixels_to_input
from mae_core.masking import sample_masks
from mae_core.pretrained import load_mae
from pipelines.config import CurateConfig
from pipelines.dataset.manifest import Manifest
from pipelines.embedding.curate import curate
from pipelines.images.decode import decode
from tests.pipelines.prepare.test_prepare import files_of

pytestmark = pytest.mark.usefixtures("in_process")
Tiles = tuple[str, Manifest]


@pytest.fixture
def config(backbone: Path) -> CurateConfig:
    return CurateConfig(model=str(backbone), batch=8, masks=2, drop_lowest=0.1, drop_highest=0.05, num_images=5)


def test_losses_equal_the_models_mean_over_masks_seeded_by_id(
    tiles: Tiles, config: CurateConfig, backbone: Path, tmp_path: Path
) -> None:
    curate(tiles[0], str(tmp_path / "out"), config)
    ranked = pq.read_table(tmp_path / "out/ranked.parquet").to_pylist()
    assert list(ranked[0]) == ["id", "source", "split", "label", "loss"]
    assert sorted(row["id"] for row in ranked) == list(range(60))
    assert [row["loss"] for row in ranked] == sorted(row["loss"] for row in ranked)
    table = pq.read_table(Path(tiles[0]) / "train/part-00000.parquet")
    images = torch.from_numpy(np.stack([decode(content, 3) for content in table["image"].to_pylist()]))
    mae, normalization = load_mae(backbone)
    expected = []
    with torch.inference_mode():
        for number in (7, 31):
            ids = torch.tensor([number])
            masks = [
                sample_masks(mae.config.mask, mae.config.grid, seed=0, epoch=0, sample_ids=ids, view=view)
                for view in (0, 1)
            ]
            inputs = pixels_to_input(images[number : number + 1], normalization)
            expected.append(float(sum(mae(inputs, mask) for mask in masks) / 2))
    losses = {row["id"]: row["loss"] for row in ranked}
    np.testing.assert_allclose([losses[7], losses[31]], expected, rtol=1e-5)


def test_lists_hold_training_images_of_both_ends(tiles: Tiles, config: CurateConfig, tmp_path: Path) -> None:
    result = curate(tiles[0], str(tmp_path / "out"), config)
    ranked = pq.read_table(tmp_path / "out/ranked.parquet").to_pylist()
    names = [row["source"] for row in ranked if row["split"] == "train"]
    lowest, highest = ((tmp_path / "out" / f"{end}.txt").read_text().splitlines() for end in ("lowest", "highest"))
    assert (lowest, highest) == (names[:4], names[-2:])
    assert (result["lowest"]["num_images"], result["highest"]["num_images"]) == (4, 2)
    for end in ("lowest", "highest"):
        with Image.open(tmp_path / "out" / f"{end}.png") as picture:
            assert picture.width > 500


@pytest.mark.slow
def test_other_shares_and_a_rerun_use_the_losses_that_are_there(
    tiles: Tiles, config: CurateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = curate(tiles[0], str(tmp_path / "out"), config)
    files = files_of(tmp_path / "out")
    monkeypatch.setattr("pipelines.embedding.run.run_parts", lambda *rest: 1 / 0)
    assert curate(tiles[0], str(tmp_path / "out"), config) == first
    assert files_of(tmp_path / "out") == files
    curate(tiles[0], str(tmp_path / "out"), dataclasses.replace(config, drop_lowest=0.5))
    assert len((tmp_path / "out/lowest.txt").read_text().splitlines()) == 20
