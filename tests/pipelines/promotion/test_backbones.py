"""The story of three backbones: a better one passes, a worse one is refused, and the champion can be rolled back."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mae_core.config import parse_arch
from mae_core.encoder import build_encoder, export_tensors
from mae_core.state import pack
from pipelines.config import PromoteConfig, RollbackConfig
from pipelines.promotion.promote import promote
from pipelines.promotion.rollback import rollback
from pipelines.registry import Tracking, open_tracking, register_backbone
from pipelines.runs.folder import RunFolder
from tests.pipelines.drivers.small import ARCH, working_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAME = f"mae-{ARCH}"
PROBE = """
kind: classify
epochs: 60
data: {batch: 64, micro_batch: 32}
classifier: {method: probe, pool: avg, head_std: 0.01}
optim: {name: lars, base_lr: 8.0, min_lr: 0, warmup_epochs: 0, weight_decay: 0}
augment: {crop: none, flip: false}
compute: {num_workers: %d}
"""


def backbone_files(*, is_blind: bool) -> dict[str, bytes | Path]:
    """Return a random encoder, which shows more than chance, or one that sees every image alike."""
    torch.manual_seed(0)
    vit = build_encoder(parse_arch(ARCH), (28, 28), 1)
    if is_blind:
        with torch.no_grad():
            vit.patch_embed.proj.weight.zero_()
    model = {"arch": ARCH, "image_px": [28, 28], "channels": 1}
    config = {"kind": "backbone", "model": model, "pixels": {"mean": [0.3], "std": [0.35]}}
    return {"encoder.safetensors": pack(export_tensors(vit)), "config.json": json.dumps(config).encode()}


@pytest.fixture
def tracking(ray4: None, tmp_path: Path) -> Iterator[Tracking]:
    with working_in(tmp_path):
        tracking = open_tracking("mae")
        for number, is_blind in enumerate((True, False, True)):
            run = tracking.run(f"p{number}", "pretrain", {})
            register_backbone(run, backbone_files(is_blind=is_blind), NAME)
            run.finish()
        yield tracking


@pytest.mark.parametrize(
    ("labels", "num_workers"), [(("50%",), 1), pytest.param(("", "50%"), 2, marks=pytest.mark.long)]
)
def test_a_better_backbone_passes_a_worse_one_is_refused_and_rollback_returns(
    tracking: Tracking, few_prepared: str, tmp_path: Path, labels: tuple[str, ...], num_workers: int
) -> None:
    (tmp_path / "tiny_probe.yaml").write_text(PROBE % num_workers)
    gate = tmp_path / "tiny_gate.yaml"
    gate.write_text(
        f"kind: gate\ntrain: {tmp_path}/tiny_probe.yaml\n"
        f"labels: {json.dumps(labels)}\nsplit: test\nmax_class_loss: 60\n"
    )
    config = PromoteConfig(gate=str(gate), data=(few_prepared,), output=str(tmp_path / "runs"))
    promote(f"{NAME}/1", PromoteConfig(force=True, why="the only one"))
    passed = promote(f"{NAME}/2", config)
    assert passed["promoted"], passed["text"]
    gains = {f"{Path(few_prepared).name}/{share.replace('%', '_percent') or 'all'}/gain_low" for share in labels}
    assert all(passed["figures"][gain] > 0 for gain in gains)
    runs = [path for path in (tmp_path / "runs").iterdir() if (path / "outcome.json").is_file()]
    assert len(runs) == 2 * len(labels)
    # The predictions that the gate compares are those of the accuracy that each run reports.
    reported = {RunFolder(str(path)).read_outcome()["top1"] for path in runs}  # pyright: ignore[reportOptionalSubscript]
    shown = {value for figure, value in passed["figures"].items() if figure.endswith("top1")}
    assert {round(value, 3) for value in shown} == reported

    refused = promote(f"{NAME}/3", config)
    assert not refused["promoted"]
    assert gains <= set(refused["unmet"])
    assert tracking.resolve(f"models:/{NAME}@champion").version == 2
    # The champion's own runs are read again, and only the candidate's are trained.
    assert len([path for path in (tmp_path / "runs").iterdir() if (path / "outcome.json").is_file()]) == 3 * len(labels)
    assert rollback(NAME, RollbackConfig())["model"] == f"models:/{NAME}/1"
    assert tracking.resolve(f"models:/{NAME}@champion").version == 1
