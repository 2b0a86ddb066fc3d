"""`mae bench start`: the time from the command to the first training step, by stage.

1. Small images are drawn and prepared once. `mae pretrain` then runs as a process of its own, once a round.
2. All its processes append their stages to one file (`pipelines.stages`). Rank 0 speaks for the workers.
3. A stage's time is the median over the rounds. What no stage covers lies between two of them.

The first round also warms the caches of files, of compiled code and of bytecode, so it is shown apart.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from pipelines.bench.config import StartBenchConfig
from pipelines.bench.data import machine
from pipelines.config import PretrainConfig, load_preset
from pipelines.errors import CommandFailed
from pipelines.stages import TIMELINE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What one process did; times are in seconds since the command started."""

    what: str
    started_s: float
    ended_s: float


def run(config: StartBenchConfig) -> dict[str, Any]:
    """Start a pretraining `rounds` times after a first one; return the figures, with a table in `text`.

    Raises CommandFailed with the last line of what the command says if it fails.
    """
    preset = load_preset(PretrainConfig, config.preset)
    with tempfile.TemporaryDirectory(prefix="mae-bench-") as name:
        folder = Path(name)
        _draw(folder / "images" / "train", preset)
        _mae(folder, "prepare", str(folder / "images"), str(folder / "prepared"), "--val-fraction", "0")
        rounds = []
        for number in range(config.rounds + 1):
            rounds.append(_round(config, folder, number))
            log.info("round %d: first step after %.1f s", number, rounds[-1][-1].ended_s)
    return _figures(config, rounds)


def _draw(folder: Path, preset: PretrainConfig) -> None:
    """Draw the images of two steps."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    height, width = preset.model.image_px
    for number in range(2 * preset.data.batch):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{number:05d}.png")


def _round(config: StartBenchConfig, folder: Path, number: int) -> list[Stage]:
    """Pretrain for an epoch and return the stages up to the end of the first step, in order of their start."""
    timeline = folder / f"timeline-{number}.jsonl"
    where = ["--data.uri", str(folder / "prepared"), "--output", str(folder / "runs"), "--name", f"start-{number}"]
    words = ["--preset", config.preset, "--epochs", "1", "--optim.warmup-epochs", "0", *where]
    switch = "--compute.compile" if config.compile else "--compute.no-compile"
    _mae(folder, "pretrain", *words, switch, "--tracking.no-register", timeline=timeline)
    return stages_of(timeline.read_text())


def stages_of(timeline: str) -> list[Stage]:
    """Read the stages of a timeline, in order of their start, as far as the end of the first step."""
    found = [json.loads(line) for line in timeline.splitlines()]
    start_s = min(one["started_s"] for one in found)
    stages = [Stage(one["what"], one["started_s"] - start_s, one["ended_s"] - start_s) for one in found]
    return sorted(stages, key=lambda stage: stage.ended_s)


def _mae(folder: Path, *words: str, timeline: Path | None = None) -> None:
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    if timeline is not None:
        env[TIMELINE] = str(timeline)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CommandFailed(f"mae {words[0]}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _figures(config: StartBenchConfig, rounds: list[list[Stage]]) -> dict[str, Any]:
    first, *warm = rounds
    names = [stage.what for stage in warm[0]]
    took_s = {
        name: [one.ended_s - one.started_s for found in warm for one in found if one.what == name] for name in names
    }
    began_s = {name: [one.started_s for found in warm for one in found if one.what == name] for name in names}
    total_s = [found[-1].ended_s for found in warm]
    found = {
        "machine": machine(),
        "preset": config.preset,
        "compile": config.compile,
        "first_step_s": median(total_s),
        "first_round_s": first[-1].ended_s,
        "stages": {name: {"started_s": median(began_s[name]), "took_s": median(took_s[name])} for name in names},
    }
    how = "compiled" if config.compile else "eager"
    lines = [f"mae pretrain --preset {config.preset}, {how}; {found['machine']}", f"  {'':42} starts at  takes"]
    for name, stage in found["stages"].items():
        lines.append(f"  {name:42} {stage['started_s']:7.1f} s {stage['took_s']:5.1f} s")
    lines.append(
        f"  first step after {found['first_step_s']:.1f} s (median of {len(warm)}, {min(total_s):.1f} to "
        f"{max(total_s):.1f} s); {found['first_round_s']:.1f} s in the first round"
    )
    return found | {"text": "\n".join(lines)}
