"""The segmentation probe, on foreground masks of the shipped sample."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.errors import UserError
from mae_core.segmentation import IGNORE
from pipelines.config import SegmentConfig
from pipelines.evaluation import segment as module
from pipelines.evaluation.pairs import read_mask, read_pairs
from pipelines.evaluation.segment import segment
from pipelines.storage import open_storage


@pytest.fixture
def pairs(sample: Path, tmp_path: Path) -> Path:
    """Return a folder of 20 bags, enlarged to 40 x 32 px, with masks of their foreground and ignored edges."""
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for path in sorted((sample / "train" / "bag").iterdir())[:20]:
        image = Image.open(path).convert("L").resize((32, 40))
        pixels = np.asarray(image)
        mask = (pixels > 60).astype(np.uint8)
        mask[(pixels > 40) & (pixels <= 60)] = IGNORE
        image.save(folder / "images" / path.name)
        Image.fromarray(mask).save(folder / "masks" / path.name)
    (folder / "classes.txt").write_text("background\nbag\nstrap\n")
    return folder


@pytest.fixture
def config(backbone: Path) -> SegmentConfig:
    return SegmentConfig(model=str(backbone), epochs=30, lr=1e-2, num_pictures=2, log=False)


def found(folder: Path, seed: int = 0, val_fraction: float = 0.2) -> Any:
    return read_pairs(open_storage(folder), val_fraction=val_fraction, seed=seed)


def test_foreground_is_found_and_an_absent_class_is_named(pairs: Path, config: SegmentConfig, tmp_path: Path) -> None:
    result = segment(str(pairs), str(tmp_path / "out"), config)
    assert (result["num_train"], result["num_val"], result["num_undecodable"]) == (16, 4, 0)
    assert result["iou"].keys() == {"background", "bag"}
    assert result["absent_classes"] == ["strap"]
    assert result["miou"] == pytest.approx(np.mean(list(result["iou"].values())))
    # Half of the pixels are foreground, so that one class alone would have 25 % on average.
    assert result["miou"] > 60
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "text"}
    with Image.open(tmp_path / "out" / "segments.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_a_resumed_probe_equals_an_undisturbed_one(
    pairs: Path, config: SegmentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segment(str(pairs), str(tmp_path / "whole"), config)
    monkeypatch.setattr(module, "_IMAGES_PER_PART", 5)
    keep = module._keep

    def killed(head: Any, optimizer: Any, storage: Any, epoch: int) -> None:
        keep(head, optimizer, storage, epoch)
        if epoch == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_keep", killed)
    monkeypatch.setattr(module, "_KEEP_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        segment(str(pairs), str(tmp_path / "resumed"), config)
    monkeypatch.setattr(module, "_keep", keep)
    monkeypatch.setattr(module, "_encode", None)  # all tokens are there
    resumed = segment(str(pairs), str(tmp_path / "resumed"), config)
    assert resumed["iou"] == whole["iou"]
    assert (tmp_path / "resumed" / "head.safetensors").read_bytes() == (
        tmp_path / "whole" / "head.safetensors"
    ).read_bytes()


def test_a_head_that_knows_the_truth_has_an_miou_of_100(
    pairs: Path, config: SegmentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths = iter([read_mask((pairs / pair.mask).read_bytes()) for pair in found(pairs).val])

    def perfect(logits: torch.Tensor, size_px: Any) -> torch.Tensor:
        truth = torch.from_numpy(next(truths))
        assert tuple(truth.shape) == size_px
        return torch.nn.functional.one_hot(truth.clamp(max=2), 3).permute(2, 0, 1)[None]

    monkeypatch.setattr(module, "upsample", perfect)
    result = segment(str(pairs), str(tmp_path / "out"), dataclasses.replace(config, epochs=1))
    assert (result["miou"], result["pixel_accuracy"]) == (100, 100)


def test_the_split_is_seeded_disjoint_and_complete(pairs: Path) -> None:
    some, again, other = found(pairs), found(pairs), found(pairs, seed=1)
    assert some.val == again.val != other.val
    assert sorted(pair.stem for pair in [*some.train, *some.val]) == sorted(p.stem for p in (pairs / "masks").iterdir())
    assert set(found(pairs, val_fraction=0.1).val) < set(some.val)


def test_given_splits_are_kept(pairs: Path) -> None:
    for name in ("images", "masks"):
        for i, path in enumerate(sorted((pairs / name).iterdir())):
            target = pairs / ("train" if i < 15 else "val") / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    split = found(pairs)
    assert (len(split.train), len(split.val)) == (15, 5)


def test_a_palette_is_read_as_indices() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, IGNORE]], dtype=np.uint8)).convert("P")
    image.putpalette([200, 10, 10] * 256)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert read_mask(file.getvalue()).tolist() == [[0, 1], [2, 255]]


def test_broken_pairs_are_counted_and_named(pairs: Path) -> None:
    names = sorted(path.name for path in (pairs / "images").iterdir())
    (pairs / "images" / names[0]).write_bytes(b"no image")
    (pairs / "masks" / names[1]).write_bytes((pairs / "masks" / names[1]).read_bytes()[:60])
    split = found(pairs)
    assert len(split.train) + len(split.val) == 18
    assert [row["image"] for row in split.failed] == [f"images/{name}" for name in names[:2]]


def first(folder: Path) -> Path:
    return min(folder.iterdir())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda at: first(at / "masks").unlink(), "1 images in .* have no partner in masks/: "),
        (lambda at: first(at / "images").unlink(), "1 masks in .* have no partner in images/: "),
        (lambda at: Image.new("RGB", (32, 40)).save(first(at / "masks")), "RGB pixels instead of class indices"),
        (lambda at: Image.new("L", (31, 40)).save(first(at / "masks")), "is 40 x 32 px but .* 40 x 31;"),
        (lambda at: (at / "classes.txt").write_text("one\n"), "has 1 names but masks have classes up to 1"),
        (lambda at: (at / "images").rename(at / "pictures"), "has no images in images/; give a folder with images/"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs: Path, break_it: Any, said: str) -> None:
    break_it(pairs)
    with pytest.raises(UserError, match=said):
        found(pairs)


def test_another_probe_in_the_folder_is_refused(pairs: Path, config: SegmentConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, epochs=1)
    segment(str(pairs), str(tmp_path / "out"), config)
    with pytest.raises(UserError, match="holds the segmentation probe of another config; choose another folder"):
        segment(str(pairs), str(tmp_path / "out"), dataclasses.replace(config, seed=1))
