"""Neighbours are those of a plain computation, and of near-duplicates one is kept."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mae_core.errors import UserError
from pipelines.config import EmbedConfig, NeighboursConfig, PrepareConfig
from pipelines.embedding.embed import embed
from pipelines.embedding.neighbours import neighbours
from pipelines.prepare import prepare

pytestmark = pytest.mark.usefixtures("in_process")
CONFIG = NeighboursConfig(k=3, queries=4)


@pytest.fixture
def source(few: Path, tmp_path: Path) -> Path:
    """100 images of the sample, with copies of four of them that are encoded in another way."""
    folder = tmp_path / "source"
    for path in sorted(few.glob("train/*/*.png"))[::3]:
        (folder / path.relative_to(few)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(few))
    chosen = sorted(folder.glob("train/*/*.png"))[:3]
    for path, name in zip(
        [*chosen, chosen[0]], ("train/bag/a.bmp", "test/bag/b.bmp", "train/dress/c.bmp", "val/bag/d.bmp")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(path.read_bytes())).save(folder / name, "BMP")
    return folder


@pytest.fixture
def embeddings(source: Path, backbone: Path, tmp_path: Path) -> Path:
    embed(str(source), str(tmp_path / "embeddings"), EmbedConfig(model=str(backbone)))
    return tmp_path / "embeddings"


def test_neighbours_equal_the_plain_computation(embeddings: Path) -> None:
    result = neighbours(str(embeddings), CONFIG)
    rows = [row for path in sorted((embeddings / "parts").iterdir()) for row in pq.read_table(path).to_pylist()]
    vectors = np.array([row["embedding"] for row in rows], np.float64)
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    found = pq.read_table(embeddings / "neighbours.parquet").to_pylist()
    assert [row["source"] for row in found] == [row["source"] for row in rows]
    for row, near in zip(found, cosines):
        np.testing.assert_allclose(row["scores"], np.sort(near)[::-1][:3], atol=1e-5)
        np.testing.assert_allclose(near[row["neighbours"]], row["scores"], atol=1e-5)
    labels = np.array([row["label"] for row in rows])
    votes = [labels[np.argsort(-near)[:3]].tolist() for near in cosines]
    # Of three votes, a label that has two wins; of three different ones, the nearest.
    expected = [max(vote, key=lambda label: (vote.count(label), -vote.index(label))) for vote in votes]
    assert result["knn_accuracy"] == pytest.approx(100 * np.mean(labels == expected))
    with Image.open(embeddings / "neighbours.png") as picture:
        assert picture.width > 500
    assert (embeddings / "neighbours.json").is_file()


def test_of_near_duplicates_one_is_kept_in_test_else_val_else_train(embeddings: Path, source: Path) -> None:
    result = neighbours(str(embeddings), dataclasses.replace(CONFIG, duplicates_above=0.9999))
    first, second, third = (str(path.relative_to(source)) for path in sorted(source.glob("train/*/*.png"))[:3])
    listed = (embeddings / "duplicates.txt").read_text().splitlines()
    assert result["num_duplicates"] == len(listed) == 4
    assert {first, second, "train/bag/a.bmp"} <= set(listed)
    # Both are in train: the one with the lower id is kept.
    assert len({third, "train/dress/c.bmp"} & set(listed)) == 1
    # Pairs: three copies of the first image, and two of each of the others.
    assert result["num_duplicate_pairs"] == 3 + 1 + 1


@pytest.mark.usefixtures("without_ray")
def test_prepare_leaves_out_what_is_listed(embeddings: Path, source: Path, tmp_path: Path) -> None:
    neighbours(str(embeddings), dataclasses.replace(CONFIG, duplicates_above=0.9999))
    exclude = (str(embeddings / "duplicates.txt"),)
    manifest = prepare(str(source), str(tmp_path / "prepared"), PrepareConfig(exclude=exclude))
    assert manifest.summary["num_excluded"] == 4
    assert manifest.num_found == 80


def test_ivf_finds_nearly_the_same(embeddings: Path, tmp_path: Path) -> None:
    results = {
        index: neighbours(str(embeddings), dataclasses.replace(CONFIG, index=index, out=str(tmp_path / index)))
        for index in ("exact", "ivf")
    }
    exact, ivf = (
        np.array(pq.read_table(tmp_path / index / "neighbours.parquet")["neighbours"].to_pylist()) for index in results
    )
    # With as few lists as here, all are searched.
    assert (exact == ivf).mean() > 0.95


def test_whitening_needs_more_images_than_features(embeddings: Path, backbone: Path, few: Path, tmp_path: Path) -> None:
    neighbours(str(embeddings), dataclasses.replace(CONFIG, transform="whiten"))
    shutil.copytree(few / "test/bag", tmp_path / "small")
    embed(str(tmp_path / "small"), str(tmp_path / "few"), EmbedConfig(model=str(backbone)))
    with pytest.raises(UserError, match="whitening 64 features needs more than 20 images; try --transform centre"):
        neighbours(str(tmp_path / "few"), dataclasses.replace(CONFIG, transform="whiten"))
    assert neighbours(str(tmp_path / "few"), CONFIG)["knn_accuracy"] is None


def test_what_is_missing_is_named(embeddings: Path, source: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no embeddings.json; run `mae embed SOURCE OUT` first"):
        neighbours(str(few), CONFIG)
    source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="give their place by --source"):
        neighbours(str(embeddings), CONFIG)
    neighbours(str(embeddings), dataclasses.replace(CONFIG, source=str(tmp_path / "moved")))
    with pytest.raises(UserError, match="has changed since it was read"):
        neighbours(str(embeddings), dataclasses.replace(CONFIG, source=str(few)))
