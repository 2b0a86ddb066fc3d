"""The notebook runs as it is committed, on a backbone and images where `mae demo` leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core import ModelConfig, Normalization, build_mae
from mae_core.state import model_tensors, pack
from pipelines import sample
from pipelines.registry import open_tracking, register_backbone
from pipelines.worker.export import backbone_files

NOTEBOOK = Path(__file__).parents[2] / "examples" / "embed_and_reconstruct.ipynb"
CONFIG = ModelConfig(
    arch="vit_pico_patch4", image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=64, decoder_heads=4
)


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def demo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create what the notebook reads of a demo: over 400 test images, and a backbone in MLflow on sqlite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mae-demo/mlflow.db")
    (tmp_path / "mae-demo").mkdir()
    sample.unpack(tmp_path / "mae-demo" / "images")
    files = backbone_files(CONFIG, Normalization(mean=(0.3,), std=(0.35,)), pack(model_tensors(build_mae(CONFIG, 0))))
    run = open_tracking("mae").run("demo", "pretrain", {})
    register_backbone(run, dict(files), "mae-vit_pico_patch4")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_the_notebook_embeds_a_folder_and_draws_reconstructions(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}[{cell['id']}]", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "models:/mae-vit_pico_patch4/1: vit_pico_patch4 at 28 x 28 px",
        "images (400, 28, 28, 1) torch.uint8",
        "embeddings (400, 64)",
    ]
    assert torch.equal(names["nearest"][:, 0], names["queries"])
    assert names["similar"].size == (6 * 28 * 2, 6 * 28 * 2)
    masked, restored, original = np.split(np.asarray(names["reconstructions"])[::2, ::2], 3)
    assert masked.shape == (28, 12 * 28)
    assert np.array_equal(original, torch.cat(list(names["shown"]), dim=1)[..., 0].numpy())
    visible = ~names["mask"].is_hidden().reshape(12, 7, 7).repeat_interleave(4, 1).repeat_interleave(4, 2)
    visible = torch.cat(list(visible), dim=1).numpy()
    assert np.array_equal(masked[visible], original[visible])
    assert np.array_equal(restored[visible], original[visible])
    assert not np.array_equal(restored[~visible], masked[~visible])


def test_the_notebook_is_committed_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
