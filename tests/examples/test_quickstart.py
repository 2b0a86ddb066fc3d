import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_learns_and_prints_what_it_did(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loss, visible, error, embeddings = done.stdout.splitlines()
    first, last = map(float, re.findall(r"[\d]+\.[\d]+", loss))
    assert last < first / 2
    assert visible == "16 of 64 patches visible"
    gray, predicted = map(float, re.findall(r"[\d]+\.[\d]+", error))
    assert predicted < gray / 2
    assert embeddings == "embeddings (512, 64)"
    assert list(tmp_path.iterdir()) == []
