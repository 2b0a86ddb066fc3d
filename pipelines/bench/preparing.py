"""`mae bench prepare`: images/s of `mae prepare` on one core and on several, beside another version and MDSWriter.

1. Every variant is a process of its own, restricted to its cores, that prepares a few images before its clock starts:
   Ray and its workers are up, and everything is imported and compiled. What starting takes is not measured.
2. Variants alternate in rounds. A rate is a median over rounds, and a ratio is one of such medians.
3. MDSWriter is used as MosaicML's documentation shows for parallel conversion: one process per core writes the bytes of
   its share, and indexes are merged. It decodes nothing; so that both have verified every image, each process also
   decodes its images with Pillow.

CPU seconds per image are those of all processes of a variant: on a machine that others use, wall-clock time says
little.
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

from mae_core.errors import UserError
from pipelines.bench.config import PrepareBenchConfig
from pipelines.bench.data import machine, sample_images
from pipelines.bench.variants import only_cores, write_images
from pipelines.errors import CommandFailed

log = logging.getLogger(__name__)

# Enough that every core gets a piece, so that every worker process is up.
_FEW = 256
_TIMED = """
import json, os, shutil, sys, time
import psutil

def timed(write, few, images, out, num_images):
    def cpu_s():
        me = psutil.Process()
        return sum(sum(process.cpu_times()[:4]) for process in (me, *me.children(recursive=True)))
    write(few, out + "-few")
    started_s, before_s = time.monotonic(), cpu_s()
    write(images, out)
    print(json.dumps({"wall_s": time.monotonic() - started_s, "cpu_s": cpu_s() - before_s}))
"""
_OURS = """
from pipelines import cluster
from pipelines.config import ComputeConfig, PrepareConfig
from pipelines.prepare import prepare

few, images, out, num_images = sys.argv[1:5]
# A version that has no such function declares five CPUs, whatever the machine has.
with cluster.ray_session(None if hasattr(cluster, "task_slots") else ComputeConfig()):
    timed(lambda source, target: prepare(source, target, PrepareConfig(val_fraction=0)), few, images, out, num_images)
"""
_MDS = """
import io
from multiprocessing import get_context
from pathlib import Path
from PIL import Image
from streaming import MDSWriter
from streaming.base.util import merge_index

def convert(job):
    paths, out = job
    with MDSWriter(out=out, columns={"image": "bytes", "label": "int"}, size_limit=2**30) as writer:
        for path in paths:
            content = Path(path).read_bytes()
            Image.open(io.BytesIO(content)).load()
            writer.write({"image": content, "label": 0})

if __name__ == "__main__":
    few, images, out, num_images = sys.argv[1:5]
    cores = len(os.sched_getaffinity(0))
    pool = get_context("fork").Pool(cores)

    def write(source, target):
        paths = sorted(map(str, Path(source).rglob("*.*")))
        pool.map(convert, [(paths[i::cores], f"{target}/{i}") for i in range(cores)], chunksize=1)
        merge_index(target, keep_local=True)

    timed(write, few, images, out, num_images)
    pool.terminate()
"""


@dataclass(frozen=True)
class _Variant:
    title: str
    script: str
    cores: int
    path: str
    """PYTHONPATH of its process."""


def run(config: PrepareBenchConfig) -> dict[str, Any]:
    """Measure all variants; return the figures, with a table in `text`. Raises UserError without images."""
    images = list(sample_images(config.source, config.num_images))
    if not images:
        raise UserError(f"no readable image in {config.source}; give a folder that has images")
    variants = _variants(config)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory(prefix="mae-bench-") as name:
        folder = Path(name)
        write_images(images, folder / "images", config.num_images)
        write_images(images, folder / "few", min(_FEW, config.num_images))
        for number in range(config.rounds):
            for key, variant in variants.items():
                with tempfile.TemporaryDirectory(prefix=f"{key}-", dir=folder) as out:
                    rounds[key].append(_measured(variant, folder, Path(out) / "out", config.num_images))
                log.info("round %d: %s: %.1f s", number + 1, variant.title, rounds[key][-1]["wall_s"])
    return _figures(config, variants, rounds)


def _variants(config: PrepareBenchConfig) -> dict[str, _Variant]:
    here = str(Path(__file__).parents[2])
    found = {
        "one": _Variant("mae prepare, 1 core", _OURS, 1, here),
        "ours": _Variant(f"mae prepare, {config.cores} cores", _OURS, config.cores, here),
    }
    if config.other is not None:
        found["other"] = _Variant(f"{config.other}, {config.cores} cores", _OURS, config.cores, str(config.other))
    if config.mds is not None:
        found["mds"] = _Variant(f"MDSWriter, {config.cores} cores", _MDS, config.cores, str(config.mds))
    return found


def _measured(variant: _Variant, folder: Path, out: Path, num_images: int) -> dict[str, float]:
    """Run the variant's process. Raises CommandFailed with the last line of what it says if it fails."""
    words = [str(folder / "few"), str(folder / "images"), str(out), str(num_images)]
    script = folder / "variant.py"
    script.write_text(_TIMED + variant.script)
    with only_cores(variant.cores):
        done = subprocess.run(
            [sys.executable, str(script), *words],
            env=os.environ | {"PYTHONPATH": variant.path, "OMP_NUM_THREADS": "1"},
            # Ray's workers look for modules there first.
            cwd=variant.path,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise CommandFailed(f"{variant.title}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _figures(
    config: PrepareBenchConfig, variants: dict[str, _Variant], rounds: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    wall_s = {name: median(one["wall_s"] for one in found) for name, found in rounds.items()}
    cpu_ms = {name: 1000 * median(one["cpu_s"] for one in found) / config.num_images for name, found in rounds.items()}
    found = {
        "machine": machine(),
        "num_images": config.num_images,
        "cores": config.cores,
        "images_per_s": {name: config.num_images / seconds for name, seconds in wall_s.items()},
        "cpu_ms_per_image": cpu_ms,
        "speed_up": wall_s["one"] / wall_s["ours"],
        "rounds": rounds,
    }
    lines = [f"{config.num_images} images; {found['machine']}", f"  {'':40} images/s  CPU ms/image  spread"]
    for name, variant in variants.items():
        times_s = [one["wall_s"] for one in rounds[name]]
        spread = (max(times_s) - min(times_s)) / wall_s[name]
        lines.append(
            f"  {variant.title[-40:]:40} {found['images_per_s'][name]:8.1f}  {cpu_ms[name]:12.2f}  {spread:5.0%}"
        )
    lines.append(
        f"  {found['speed_up']:.2f} x from 1 to {config.cores} cores ({found['speed_up'] / config.cores:.0%}); each "
        f"image takes {cpu_ms['one'] / cpu_ms['ours']:.0%} of the CPU time of all cores on one"
    )
    return found | {"text": "\n".join(lines)}
