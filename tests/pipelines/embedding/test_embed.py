"""Embeddings are the encoder's, every image is accounted for, and a resumed run equals an undisturbed one."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mae_core.errors import UserError
from mae_core.pretrained import load_encoder
from pipelines.config import EmbedConfig, PrepareConfig
from pipelines.dataset.manifest import Manifest
from pipelines.embedding import run
from pipelines.embedding.embed import automatic_batch, embed
from pipelines.embedding.parts import PartWorker, _Halving
from pipelines.images.decode import decode, evaluation_view
from pipelines.interrupts import Interrupted
from pipelines.prepare import prepare
from pipelines.storage import open_storage
from tests.pipelines.prepare.test_prepare import files_of, fill

pytestmark = pytest.mark.usefixtures("in_process")
Tiles = tuple[str, Manifest]


@pytest.fixture
def config(backbone: Path) -> EmbedConfig:
    return EmbedConfig(model=str(backbone), batch=8, rows_per_part=16)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """Rows by the image's name, in the order of the files."""
    tables = [pq.read_table(path).to_pylist() for path in sorted((out / "parts").glob("*.parquet"))]
    return {row["source"]: row for table in tables for row in table}


def view_of(path: Path) -> np.ndarray:
    return evaluation_view(decode(path.read_bytes(), 3), (8, 8))


@pytest.mark.slow
def test_embeddings_equal_the_encoders_on_the_same_pixels(
    backbone: Path, few: Path, config: EmbedConfig, tmp_path: Path
) -> None:
    encoder = load_encoder(backbone)
    embed(str(few), str(tmp_path / "avg"), config)
    rows = rows_of(tmp_path / "avg")
    assert len(rows) == 300
    names = list(rows)[:8]
    images = torch.from_numpy(np.stack([view_of(few / name) for name in names]))
    with torch.inference_mode():
        expected, tokens = encoder(images), encoder.tokens(images)
    # A batch of the same images in the same order gives the same bits.
    np.testing.assert_array_equal([rows[name]["embedding"] for name in names], expected.numpy())

    several = dataclasses.replace(config, pool="token", last_layers=2, patch_tokens=True)
    embed(str(few), str(tmp_path / "token"), several)
    rows = rows_of(tmp_path / "token")
    width = expected.shape[1]
    found = np.array([rows[name]["embedding"] for name in names], np.float32)
    np.testing.assert_array_equal(found[:, width:], tokens[:, 0].numpy())
    assert found.shape == (8, 2 * width)
    assert not np.allclose(found[:, :width], found[:, width:])
    patches = np.array([rows[name]["patch_tokens"] for name in names], np.float32)
    np.testing.assert_array_equal(patches.reshape(8, 4, width), tokens[:, 1:].numpy())


def test_rows_say_what_they_embed_in_the_order_of_ids(tiles: Tiles, config: EmbedConfig, tmp_path: Path) -> None:
    result = embed(tiles[0], str(tmp_path / "out"), dataclasses.replace(config, stored_as="float16"))
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out/parts").glob("*.parquet"))]
    assert tables[0].schema.names == ["id", "source", "split", "label", "embedding"]
    assert str(tables[0].schema.field("embedding").type).startswith("fixed_size_list<element: halffloat>[")
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["id"] for row in rows] == list(range(60))
    assert [row["split"] for row in rows] == ["train"] * 40 + ["val"] * 20
    assert [row["label"] for row in rows] == ["dark", "bright"] * 30
    assert (result["num_found"], result["num_rows"], result["num_quarantined"]) == (60, 60, 0)
    assert result["dataset_digest"] == tiles[1].digest
    manifest = json.loads((tmp_path / "out/embeddings.json").read_bytes())
    files = files_of(tmp_path / "out")
    assert {table["path"]: table["sha256"] for table in manifest["tables"]} == {
        path: sha256 for path, sha256 in files.items() if path.startswith("parts/")
    }
    assert set(manifest["identity"]["model"]) == {"config.json", "encoder.safetensors"}


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_prepared_dataset_gives_what_its_source_gives(few: Path, config: EmbedConfig, tmp_path: Path) -> None:
    prepare(str(few), str(tmp_path / "prepared"), PrepareConfig(rows_per_shard=50, rows_per_group=16))
    embed(str(few), str(tmp_path / "a"), config)
    embed(str(tmp_path / "prepared"), str(tmp_path / "b"), config)
    source, prepared = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert source.keys() == prepared.keys()
    for name, row in source.items():
        assert row["label"] == prepared[name]["label"]
        # Batches hold other images, and a short one may take another path through the matrix product.
        np.testing.assert_allclose(row["embedding"], prepared[name]["embedding"], rtol=1e-4, atol=1e-5)


def test_the_zoo_is_accounted_for(zoo: list, config: EmbedConfig, tmp_path: Path) -> None:
    source = fill(tmp_path / "zoo", {animal.name: animal.content for animal in zoo})
    with pytest.raises(UserError, match=r"15 of 44 images are bad, more than max_bad 0.01 allows: .*higher --max-bad"):
        embed(str(source), str(tmp_path / "out"), config)
    assert not (tmp_path / "out/embeddings.json").exists()
    result = embed(str(source), str(tmp_path / "out"), dataclasses.replace(config, max_bad=1))
    bad = [animal for animal in zoo if animal.reason]
    assert result["num_found"] == len(zoo) == result["num_rows"] + result["num_quarantined"]
    assert result["num_quarantined"] == len(bad)
    assert set(rows_of(tmp_path / "out")) == {animal.name for animal in zoo if not animal.reason}
    quarantined = [
        row for path in sorted((tmp_path / "out/quarantine").iterdir()) for row in pq.read_table(path).to_pylist()
    ]
    assert {row["source"] for row in quarantined} == {animal.name for animal in bad}
    assert result["reasons"] == dict(sorted(Counter(row["reason"].split(":")[0] for row in quarantined).items()))


@pytest.mark.slow
def test_a_rerun_computes_only_the_missing_parts_and_ends_in_the_same_bytes(
    few: Path, config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(str(few), str(tmp_path / "a"), config)
    written: list[int] = []
    call = PartWorker.__call__

    def killed_at_five(worker: PartWorker, row: dict[str, Any]) -> dict[str, int]:
        written.append(row["number"])
        if len(written) == 5:
            raise KeyboardInterrupt
        return call(worker, row)

    with monkeypatch.context() as patch:
        patch.setattr(PartWorker, "__call__", killed_at_five)
        with pytest.raises(Interrupted, match=r"^stopped with 4 of \d+ parts done$"):
            embed(str(few), str(tmp_path / "b"), config)
        assert not (tmp_path / "b/embeddings.json").exists()
        with pytest.raises(UserError, match="holds the unfinished embedding of another source or config"):
            embed(str(few), str(tmp_path / "b"), dataclasses.replace(config, pool="token"))
        assert len(written) == 5
        embed(str(few), str(tmp_path / "b"), config)
    assert sorted(written) == sorted([*range(38), 4])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not list((tmp_path / "b").rglob(".*"))
    assert embed(str(few), str(tmp_path / "b"), config) == embed(str(few), str(tmp_path / "a"), config) | {
        "uri": str(tmp_path / "b")
    }


def test_images_that_change_between_two_attempts_are_embedded_again(
    few: Path, config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(few / "test", source)
    computed: list[int] = []
    call = PartWorker.__call__

    def counted(worker: PartWorker, row: dict[str, Any]) -> dict[str, int]:
        computed.append(row["number"])
        return call(worker, row)

    monkeypatch.setattr(PartWorker, "__call__", counted)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_check", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(str(source), str(tmp_path / "out"), config)
    assert computed == [*range(8)]
    os.utime(sorted(source.rglob("*.png"))[0], ns=(0, 0))
    embed(str(source), str(tmp_path / "out"), config)
    assert len(computed) == 9


@pytest.mark.slow
def test_another_model_dataset_or_folder_is_refused(
    few: Path, tiles: Tiles, config: EmbedConfig, backbone: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    embed(tiles[0], out, config)
    with pytest.raises(UserError, match="holds the embeddings of another source; choose another folder"):
        embed(str(few), out, config)
    with pytest.raises(UserError, match="holds the embeddings of another config"):
        embed(tiles[0], out, dataclasses.replace(config, pool="token"))
    other = fill(tmp_path / "other", {"thesis.txt": b"my only copy"})
    with pytest.raises(UserError, match="is not empty and holds no embeddings; choose another"):
        embed(tiles[0], str(other), config)
    with pytest.raises(UserError, match="is inside the source"):
        embed(str(few), str(few / "embeddings"), config)
    with pytest.raises(UserError, match="last_layers 99 is above the encoder's"):
        embed(tiles[0], str(tmp_path / "x"), dataclasses.replace(config, last_layers=99))
    with pytest.raises(UserError, match=r"has no config.json; give models:/NAME@ALIAS, or the export/ folder"):
        embed(tiles[0], str(tmp_path / "x"), dataclasses.replace(config, model=str(few)))


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    sizes: list[int] = []

    def forward(images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return {"id": ids}

    halving = _Halving(forward, 16)
    for count in (16, 5):
        found = halving(torch.zeros(count, 8, 8, 3), torch.arange(count))
        assert found["id"].tolist() == list(range(count))
    assert (halving.fits, sizes) == (2, [2] * 8 + [2, 2, 1])

    def never(images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="one image of 8x8 px does not fit in the GPU's memory"):
        _Halving(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")), 1)(
            torch.zeros(1, 8, 8, 3), torch.arange(1)
        )


def test_the_automatic_batch_depends_on_model_and_device_only() -> None:
    assert automatic_batch(197, 768, gpu=False) == 8
    assert automatic_batch(65, 64, gpu=False) == 128
    assert automatic_batch(197, 768, gpu=True) == 512
    assert automatic_batch(10**6, 10**4, gpu=False) == 1


@pytest.mark.s3
def test_to_s3_and_from_s3_equal_local(tiles: Tiles, config: EmbedConfig, tmp_path: Path, s3: str) -> None:
    embed(tiles[0], str(tmp_path / "local"), config)
    copy = open_storage(f"{s3}/{tmp_path.name}/data")
    for path, _ in open_storage(tiles[0]).list():
        copy.write(path, open_storage(tiles[0]).read(path))
    embed(copy.uri, f"{s3}/{tmp_path.name}/out", config)
    local, remote = files_of(tmp_path / "local"), files_of(f"{s3}/{tmp_path.name}/out")
    # The manifest says where the images were.
    assert {**local, "embeddings.json": ""} == {**remote, "embeddings.json": ""}
