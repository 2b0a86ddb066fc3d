"""Pictures of a model and of a run's checkpoints, drawn without a registry and without training."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_core.config import MaskConfig, ModelConfig
from mae_core.errors import UserError
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.state import model_tensors, pack
from pipelines.config import PretrainConfig, ReconstructConfig, to_dict
from pipelines.drivers.animation import animate, encoded
from pipelines.pictures import reconstruct
from pipelines.runs.checkpoints import Checkpoint, Retention
from pipelines.runs.folder import RunFolder
from pipelines.worker.export import backbone_files

MODEL = ModelConfig(
    arch="vit_pico_patch4", image_px=(16, 16), decoder_depth=1, decoder_width=32, decoder_heads=4,
    mask=MaskConfig(ratio=0.5),
)  # fmt: skip
PIXELS = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/, the export of a model, and a run with three checkpoints."""
    home = tmp_path_factory.mktemp("pictures")
    (home / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(home / "images" / f"{i}.png")
    (home / "export").mkdir()
    for name, content in backbone_files(MODEL, PIXELS, _weights(0)).items():
        (home / "export" / name).write_bytes(content)
    run = RunFolder(str(home / "run"))
    run.claim({"kind": "pretrain", "job": {"pixels": to_dict(PIXELS)}})
    config = PretrainConfig(model=MODEL)
    run.storage.write("config.json", json.dumps(to_dict(config)).encode())
    for step in (10, 20, 30):
        meta = {"steps_per_epoch": 10, "last": {}, "run": "a"}
        files = {"model.safetensors": _weights(step)}
        run.checkpoints.save(Checkpoint(step=step, files=files, meta=meta), Retention(newest=9))
    return home


def _weights(seed: int) -> bytes:
    return pack(model_tensors(build_mae(MODEL, seed)))


def config(home: Path, out: Path, **values: Any) -> ReconstructConfig:
    return ReconstructConfig(**{"uri": str(home / "images"), "num_images": 2, "out": str(out), **values})


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_run_becomes_an_animation_with_a_frame_for_each_checkpoint(home: Path, tmp_path: Path, suffix: str) -> None:
    path = animate(config(home, tmp_path / f"run{suffix}", run=str(home / "run"), ratios=(50, 75)))
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
        image.seek(2)
        last = np.asarray(image.convert("RGB")).astype(int)
        image.seek(0)
        first = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(last - first).max() > 30


def test_the_last_frame_stays_longest() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    with Image.open(io.BytesIO(encoded(frames, ".gif", 0.2))) as image:
        durations = []
        for i in range(3):
            image.seek(i)
            durations.append(image.info["duration"])
    assert durations == [200, 200, 800]


def test_a_run_without_enough_checkpoints_says_how_to_keep_some(home: Path, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.claim({"kind": "pretrain", "job": {}})
    with pytest.raises(UserError, match="keep-every-epochs"):
        animate(config(home, tmp_path / "a.gif", run=str(tmp_path / "run")))
    with pytest.raises(UserError, match="not the folder of a pretraining run"):
        animate(config(home, tmp_path / "a.gif", run=str(home / "images")))


def titles_of(monkeypatch: pytest.MonkeyPatch, settings: ReconstructConfig) -> list[str]:
    """Draw the picture, and return the titles of its blocks."""
    titles: list[str] = []
    draw = reconstruct.reconstruction_rows

    def watched(blocks: Any, path: Path) -> None:
        titles.extend(block.title for block in blocks)
        draw(blocks, path)

    monkeypatch.setattr(reconstruct, "reconstruction_rows", watched)
    reconstruct.run(settings)
    return titles


def test_titles_say_how_many_patches_are_visible_and_what_was_not_predicted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model": str(home / "export")}
    assert titles_of(monkeypatch, config(home, tmp_path / "a.png", **model, ratios=(75, 0.5))) == [
        "75% masked: 4 of 16 patches visible",
        "50% masked: 8 of 16 patches visible",
    ]
    chosen = config(home, tmp_path / "b.png", **model, visible=(0, 5), crisp=True, paste=False)
    assert titles_of(monkeypatch, chosen) == [
        "2 chosen of 16 patches visible; visible patches predicted too; "
        "mean and contrast of hidden patches borrowed from the original"
    ]
    with pytest.raises(UserError, match="patch 16 does not exist"):
        reconstruct.run(config(home, tmp_path / "c.png", **model, visible=(16,)))


def test_each_image_gets_a_file_of_its_own(home: Path, tmp_path: Path) -> None:
    reconstruct.run(config(home, tmp_path / "a.png", model=str(home / "export"), ratios=(75, 80), separate=True))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    names = [f"a/mask-{i}-image-{j:03d}.png" for i in (1, 2) for j in (1, 2)]
    assert found == ["a.png", *names]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": (0.0,)}, "are not all within"),
        ({"ratios": (100,)}, "are not all within"),
        ({"run": "runs/a", "out": "a.jpg"}, r"must end in \.gif"),
        ({"run": "runs/a", "out": "a.gif", "separate": True}, "leave one out"),
        ({"out": "a.gif"}, r"must end in \.png"),
        ({"frame_s": 0.0}, "frame_s 0"),
    ],
)
def test_wrong_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReconstructConfig(**values)


def test_eighty_percent_of_the_papers_patches_leave_39() -> None:
    assert ReconstructConfig(ratios=(75, 80, 85, 90)).shares == (0.75, 0.8, 0.85, 0.9)
    assert ModelConfig(mask=MaskConfig(ratio=0.8)).num_visible == 39
