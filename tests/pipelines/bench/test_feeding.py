"""The bench of the feed checks what every rank gets on two raylets, and finds that a node makes its own blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench.feeding import made_segment
from tests.waiting import RUN_DEADLINE_S

ROOT = Path(__file__).parents[3]


def test_a_made_window_has_the_plans_samples() -> None:
    segment = made_segment(4, 2, 2**16)
    assert segment.num_windows == 2
    assert segment.plan.lanes == 4
    assert segment.micro_batch_bytes == 2**10


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_each_rank_gets_its_blocks_from_its_own_node() -> None:
    options = ["--nodes", "2", "--ranks-per-node", "2", "--windows", "3", "--rounds", "1", "--block-mib", "0.5"]
    found = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", "bench", "feed", *options, "--json"],
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
    )
    assert found.returncode == 0, found.stderr
    cluster, node = json.loads(found.stdout)["rows"]
    assert (cluster["design"], node["design"]) == ("cluster", "node")
    assert cluster["blocks"] == node["blocks"] > 0
    assert node["local"] == 1.0
