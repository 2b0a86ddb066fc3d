"""Thirteen bands of 16 bits go all the way: prepare, pretrain, pictures, embeddings, probe, serving."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig
from mae_core.errors import UserError
from mae_core.pretrained import load_encoder
from pipelines.config import (
    ClassifyConfig,
    DataConfig,
    EmbedConfig,
    PrepareConfig,
    PretrainConfig,
    ReconstructConfig,
)
from pipelines.dataset.manifest import Manifest
from pipelines.images.decode import input_view
from tests.pipelines.drivers.small import working_in
from tests.pipelines.images.field_files import scene, tiff

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ARCH = "vit_pico_patch8"
BANDS = 13


def satellite(folder: Path) -> None:
    """Scenes of thirteen bands whose class is the brightness of band 7, in reflectances up to 10,000."""
    for split, count in (("train", 24), ("val", 12)):
        for number in range(count):
            values = scene(BANDS, number + (100 if split == "val" else 0), side_px=48, largest=9000)
            label = number % 2
            values[:, :, 7] = values[:, :, 7] // 4 + (6000 if label else 0)
            path = folder / split / ("field", "town")[label] / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiff(values, photometric="minisblack", compression="zlib"))


@dataclass(frozen=True)
class Pretrained:
    folder: Path
    source: Path
    dataset: str
    manifest: Manifest
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def pretrained(ray4: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrained]:
    from pipelines.drivers.pretrain import pretrain
    from pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("bands")
    with working_in(folder):
        satellite(folder / "source")
        dataset = str(folder / "data")
        options = PrepareConfig(rows_per_shard=16, rows_per_group=8, range=("percentiles", "1", "99"))
        manifest = prepare(str(folder / "source"), dataset, options)
        config = PretrainConfig(
            name="mae",
            output=str(folder / "runs"),
            epochs=3,
            data=DataConfig(uri=dataset, batch=8, micro_batch=4, window=16),
            model=ModelConfig(
                arch=ARCH,
                image_px=(32, 32),
                channels=BANDS,
                decoder_depth=1,
                decoder_width=32,
                decoder_heads=2,
            ),
            optim=OptimConfig(base_lr=1e-2, warmup_epochs=0.0),
            augment=AugmentConfig(flip_vertical=True, quarter_turns=True, drop_bands=0.2),
        )
        yield Pretrained(folder, folder / "source", dataset, manifest, pretrain(config, "mae"))


def test_thirteen_bands_are_pretrained_with_their_own_range(pretrained: Pretrained) -> None:
    assert pretrained.manifest.values is not None
    config = json.loads((pretrained.folder / "runs" / "mae" / "export" / "config.json").read_text())
    assert config["model"]["channels"] == BANDS
    assert tuple(config["pixels"]["values"]["low"]) == pretrained.manifest.values.range.low
    assert len(config["pixels"]["mean"]) == BANDS
    assert np.isfinite(pretrained.outcome["loss"])


def test_pictures_show_the_three_bands_that_are_chosen(pretrained: Pretrained) -> None:
    from pipelines.pictures.reconstruct import run

    shown = {}
    for bands in ((), (7, 7, 7), (7,)):
        out = str(pretrained.folder / f"{len(shown)}.png")
        model, uri = f"models:/mae-{ARCH}@candidate", pretrained.dataset
        run(ReconstructConfig(model=model, uri=uri, split="val", num_images=2, bands=bands, out=out))
        shown[bands] = np.asarray(Image.open(out))
    np.testing.assert_array_equal(shown[7, 7, 7], shown[7,])
    assert (shown[()] != shown[7,]).any()
    with pytest.raises(UserError, match=r"bands \(13,\) are not all below the model's 13 channels"):
        run(ReconstructConfig(model=f"models:/mae-{ARCH}@candidate", uri=pretrained.dataset, bands=(13,)))


def test_embeddings_are_equal_from_files_shards_and_the_library(pretrained: Pretrained) -> None:
    from pipelines.embedding.embed import embed

    encoder = load_encoder(pretrained.folder / "runs" / "mae" / "export")
    values = encoder.normalization.values
    tables = {}
    for name, uri in {"files": str(pretrained.source), "shards": pretrained.dataset}.items():
        out = str(pretrained.folder / f"embedded-{name}")
        embed(uri, out, EmbedConfig(model=f"models:/mae-{ARCH}@candidate", stored_as="float32"))
        parts = sorted(Path(out).glob("parts/*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        tables[name] = {row["source"]: np.array(row["embedding"]) for row in rows}
    assert tables["files"].keys() == tables["shards"].keys()
    assert len(tables["files"]) == 36
    for name, found in tables["files"].items():
        np.testing.assert_allclose(found, tables["shards"][name], atol=1e-5)
    name = next(iter(tables["files"]))
    view = input_view((pretrained.source / name).read_bytes(), BANDS, (32, 32), values)
    with torch.inference_mode():
        found = encoder(torch.from_numpy(np.array(view))[None])[0].numpy()
    np.testing.assert_allclose(found, tables["files"][name], atol=1e-4)


def test_a_probe_reads_the_values_and_colour_operations_are_refused(pretrained: Pretrained) -> None:
    from pipelines.drivers.classify import finetune, probe

    config = ClassifyConfig(
        name="probe",
        output=str(pretrained.folder / "runs"),
        backbone=f"models:/mae-{ARCH}@candidate",
        epochs=100,
        data=DataConfig(uri=pretrained.dataset, batch=8, micro_batch=4),
        classifier=ClassifierConfig(method="probe", pool="avg"),
        optim=OptimConfig(name="adamw", base_lr=0.5, warmup_epochs=0.0, weight_decay=0.0),
        augment=AugmentConfig(crop="none", flip=False),
        eval_split="val",
    )
    outcome = probe(config, "probe")
    assert outcome["top1"] >= 90, "band 7 alone tells the classes apart"
    colours = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")
    tuning = ClassifyConfig(
        name="t", output=config.output, backbone=config.backbone, epochs=1, data=config.data, augment=colours,
        classifier=ClassifierConfig(method="finetune"), optim=OptimConfig(warmup_epochs=0.0), eval_split="val",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"rand_augment .* changes colours of 8-bit photographs, but .* uint16 in 13"):
        finetune(tuning, "finetune")


def test_eight_bit_photographs_are_refused_by_the_model(pretrained: Pretrained, few: Path, tmp_path: Path) -> None:
    from pipelines.drivers.pretrain import pretrain
    from pipelines.prepare import prepare

    prepare(str(few), str(tmp_path / "eight"), PrepareConfig())
    config = PretrainConfig(
        name="other",
        output=str(tmp_path / "runs"),
        backbone=f"models:/mae-{ARCH}@candidate",
        data=DataConfig(uri=str(tmp_path / "eight"), batch=8, micro_batch=4),
    )
    with pytest.raises(UserError, match=r"has 8-bit pixels but models:/.* was trained on uint16 values"):
        pretrain(config, "mae", stated=())


def test_the_served_model_gives_what_the_library_gives(pretrained: Pretrained) -> None:
    import mlflow.pyfunc
    import pandas as pd

    path = next((pretrained.source / "val").rglob("*.tif"))
    served = mlflow.pyfunc.load_model(f"models:/mae-{ARCH}@candidate")
    found = served.predict(pd.DataFrame({"image": [path.read_bytes()]})).to_numpy()[0]
    encoder = load_encoder(pretrained.folder / "runs" / "mae" / "export")
    view = input_view(path.read_bytes(), BANDS, (32, 32), encoder.normalization.values)
    with torch.inference_mode():
        np.testing.assert_allclose(found, encoder(torch.from_numpy(np.array(view))[None])[0].numpy(), atol=1e-5)
