"""An encoder that is evaluated while it is pretrained: equal weights have equal values, whatever is kept in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mae_core.config import ModelConfig, OptimConfig
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from pipelines.config import DataConfig, PeriodicEvaluationConfig, PrepareConfig, PretrainConfig
from pipelines.dataset.manifest import Manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.evaluation import periodic
from pipelines.evaluation.periodic import PeriodicEvaluator
from pipelines.images.decode import input_view
from pipelines.prepare import prepare
from tests.pipelines.images.field_files import scene, tiff


def config_of(uri: str, **evaluate: Any) -> PretrainConfig:
    return PretrainConfig(
        epochs=1,
        data=DataConfig(uri=uri, batch=16, micro_batch=8),
        model=ModelConfig(arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2),
        optim=OptimConfig(warmup_epochs=0.0),
        evaluate=PeriodicEvaluationConfig(every_epochs=1, images=30, **evaluate),
    )


def evaluator(dataset: tuple[str, Manifest], **evaluate: Any) -> PeriodicEvaluator:
    uri, manifest = dataset
    return PeriodicEvaluator(config_of(uri, **evaluate), pixels_of(manifest, 3), manifest)


def weights(seed: int) -> dict[str, NDArray[Any]]:
    encoder = build_mae(config_of("").model, seed).encoder
    return {name: tensor.numpy() for name, tensor in export_tensors(encoder).items()}


def test_bright_and_dark_tiles_are_told_apart(tiles: tuple[str, Manifest]) -> None:
    found = evaluator(tiles, knn=True).evaluate(weights(0))
    assert set(found) == {"linear_top1", "knn_top1", "rankme"}
    assert found["linear_top1"] == found["knn_top1"] == 100
    assert 1 < found["rankme"] < 30


def test_equal_weights_have_equal_values_and_others_have_others(tiles: tuple[str, Manifest]) -> None:
    one = evaluator(tiles)
    first, other, again = (one.evaluate(weights(seed)) for seed in (0, 1, 0))
    assert first == again == evaluator(tiles).evaluate(weights(0))
    assert first["rankme"] != other["rankme"]
    assert first["rankme"] != evaluator(tiles, pool="token").evaluate(weights(0))["rankme"]


@pytest.mark.usefixtures("without_ray")
def test_bands_of_sixteen_bits_are_evaluated_as_they_are_trained_on(tmp_path: Path) -> None:
    source, dataset = tmp_path / "source", str(tmp_path / "dataset")
    for number in range(20):
        values = scene(4, number, side_px=16, largest=3000)
        values[:, :, 2] += 6000 * (number % 2)
        path = source / ("field", "town")[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(values))
    prepared = prepare(str(source), dataset, PrepareConfig(range=("percentiles", "1", "99"), hold_out="stratified"))
    config = config_of(dataset, knn=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=4))
    pixels = pixels_of(prepared, 4)
    encoder = {k: t.numpy() for k, t in export_tensors(build_mae(config.model, 0).encoder).items()}
    evaluated = PeriodicEvaluator(config, pixels, prepared)
    found = evaluated.evaluate(encoder)
    assert found["linear_top1"] == found["knn_top1"] == 100
    ((images, labels),) = evaluated._fitted.batches()
    assert pixels.values is not None
    files = [input_view(path.read_bytes(), 4, (8, 8), pixels.values) for path in source.rglob("*.tif")]
    differences = np.abs(images.numpy()[:, None] - np.stack(files)).max((2, 3, 4))
    assert (differences.min(1) < 1e-6).all()
    assert len(set(differences.argmin(1))) == len(images)
    assert labels.bincount().tolist() == [9, 9]


def test_images_that_are_read_again_are_the_same(tiles: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = evaluator(tiles).evaluate(weights(0))
    monkeypatch.setattr(periodic, "_KEPT_BYTES", 0)
    monkeypatch.setattr(periodic, "_WINDOW_BYTES", 1)
    monkeypatch.setattr(periodic, "_BATCH", 8)
    again = evaluator(tiles)
    for _ in range(2):
        assert again.evaluate(weights(0)) == pytest.approx(kept)


def test_kept_images_are_read_once(tiles: tuple[str, Manifest]) -> None:
    one = evaluator(tiles)
    before = one.evaluate(weights(0))
    for path in Path(tiles[0]).rglob("*.parquet"):
        path.unlink()
    assert one.evaluate(weights(0)) == before


def test_without_labels_there_is_rankme_alone(tiles: tuple[str, Manifest]) -> None:
    uri, manifest = tiles
    assert set(evaluator((uri, dataclasses.replace(manifest, classes=[]))).evaluate(weights(0))) == {"rankme"}


def test_a_damaged_shard_is_named(tiles: tuple[str, Manifest]) -> None:
    one = evaluator(tiles)
    for path in Path(tiles[0]).rglob("val/*.parquet"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"val/part-00000\.parquet is damaged"):
        one.evaluate(weights(0))
