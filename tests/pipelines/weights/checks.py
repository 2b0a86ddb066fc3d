"""Export a model, load it by the printed line and compare it with ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_core.config import ModelConfig
from mae_core.pretrained import load_encoder
from pipelines.config import ExportConfig, from_dict
from pipelines.weights.exporting import export_model


def exported(source: Path | str, naming: str, part: str = "whole", out: str = "out") -> dict[str, Any]:
    return export_model(str(source), out, from_dict(ExportConfig, {"format": naming, "part": part}))


def run_line(line: str) -> dict[str, Any]:
    """Execute the printed line; return the names that it defines."""
    names: dict[str, Any] = {}
    exec(line, names)
    return names


def images_of(config: ModelConfig, batch: int = 3) -> Tensor:
    return torch.randn(batch, config.channels, *config.image_px)


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.abs().max().item()))


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def session_run(session: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.inference_mode()
def check_encoder(folder: Path, naming: str, out: str = "out", *, source: str = "") -> None:
    """Check that the encoder loaded by the printed line computes the same tokens as ours, which is in `folder`.

    `source` is what is exported: a version whose files are in `folder`, or else the folder itself.
    """
    outcome = exported(source or folder, naming, "encoder", out)
    names, ours = run_line(outcome["load"]), load_encoder(folder)
    run: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "timm": lambda: names["model"].forward_features,
        "transformers": lambda: lambda x: names["model"](x).last_hidden_state,
        "onnx": lambda: session_run(names["session"]),
        "torch": lambda: names["model"],
    }
    images = images_of(ours.config)
    assert_equal_to_rounding(run[naming]()(images), ours.vit.forward_features(images))
