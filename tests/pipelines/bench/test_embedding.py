"""`mae bench embed` measures all variants on the user's images."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_all_variants_are_measured(tmp_path: Path) -> None:
    """In a process of its own, since it starts Ray on fewer cores."""
    for number in range(3):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        (tmp_path / f"{number}.jpg").write_bytes(file.getvalue())
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "bench", "embed", "--json"]
    sizes = ["--arch", "vit_pico_patch4", "--image-px", "16", "--num-images", "16", "--batch", "4", "--cores", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    words = [*command, *sizes, "--rounds", "1", "--source", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_images"] == 16
    assert set(found["images_per_s"]) == {"bare", "ours", "timm"}
    assert all(rate > 0 for rate in (*found["images_per_s"].values(), *found["images_per_cpu_s"].values()))
    assert found["cpu_share_of_bare"] > 0
