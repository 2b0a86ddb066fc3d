"""A real cluster of two nodes on this machine, a real job submission, two DDP workers that meet over gloo."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NANO = """--name two-nodes --epochs 1 --model.arch vit_pico_patch4 --model.image-px 16 16
    --model.decoder-depth 1 --model.decoder-width 32 --model.decoder-heads 2 --optim.warmup-epochs 0
    --data.batch 16 --data.micro-batch 4 --data.window 16
    --compute.num-workers 2 --compute.spread"""


def test_a_job_that_fails_is_reported_as_failed(local_cluster) -> None:
    outcome = local_cluster.submit("python", "-c", "raise SystemExit(3)")
    assert outcome.returncode == 1


def test_pretraining_spreads_over_two_nodes_and_is_tracked(local_cluster, tmp_path: Path) -> None:
    images, prepared, runs = tmp_path / "images", tmp_path / "prepared", tmp_path / "runs"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{i:03}.png")
    commands = [f"mae prepare {images} {prepared}", f"mae pretrain --data.uri {prepared} --output {runs} {NANO}"]
    outcome = local_cluster.submit("sh", "-c", " && ".join(shlex.join(shlex.split(line)) for line in commands))
    assert outcome.returncode == 0, outcome.stdout
    assert sorted(local_cluster.workers().values()) == sorted(local_cluster.node_ids.values())
    (run,) = local_cluster.finished_runs()
    assert run["info"]["run_name"] == "two-nodes"
