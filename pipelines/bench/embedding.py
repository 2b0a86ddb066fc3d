"""`mae bench embed`: images/s of `mae embed`, of its encoder alone, and of timm behind torch's DataLoader.

1. All variants run on the same cores with the same random weights and batch. The bare encoder is one process per core,
   which encodes pixels in memory; DataLoader has one worker per core, beside a model with as many threads.
2. Each is warm before its clock starts: processes are up, torch is imported, one batch has passed.
3. Variants alternate in rounds. A rate is a median over rounds, and a ratio is one of such medians.

Rates are also given per CPU second of the variant's processes: on a machine that others use, wall-clock time says
little.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load, save

from mae_core.config import ModelConfig
from mae_core.encoder import export_tensors
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.pretrained import Encoder, encoder_of
from pipelines.bench.config import EmbedBenchConfig
from pipelines.bench.data import machine, sample_images
from pipelines.bench.variants import only_cores, write_images
from pipelines.config.embedding import ActorConfig
from pipelines.embedding.embed import PURPOSE, Embedding, automatic_batch
from pipelines.embedding.inputs import open_input
from pipelines.embedding.parts import PartWorker, Plan
from pipelines.embedding.run import run_parts
from pipelines.prepare.workfolder import WorkFolder
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

_IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_TITLES = {"bare": "bare encoder", "ours": "mae embed", "timm": "timm, torch DataLoader"}


@dataclass(frozen=True)
class _Model:
    """An encoder as it travels to processes."""

    config_json: str
    weights: bytes

    def build(self) -> Encoder:
        return encoder_of(json.loads(self.config_json), load(self.weights))


@dataclass(frozen=True)
class _Round:
    """What one variant did in one round."""

    num_images: int
    wall_s: float
    cpu_s: float
    """CPU seconds of all processes that read, decode or encode."""

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.wall_s

    @property
    def images_per_cpu_s(self) -> float:
        return self.num_images / self.cpu_s


def run(config: EmbedBenchConfig) -> dict[str, Any]:
    """Measure all variants; return the figures, with a table in `text`. Raises UserError without images."""
    images = list(sample_images(config.source, config.num_images))
    model_config = ModelConfig(arch=config.arch, image_px=(config.image_px, config.image_px))
    mae = build_mae(model_config, seed=0)
    values = {"kind": "backbone", "model": asdict(model_config), "pixels": asdict(_IMAGENET)}
    weights = {name: tensor.contiguous() for name, tensor in export_tensors(mae.encoder).items()}
    model = _Model(json.dumps(values), save(weights))
    batch = config.batch or automatic_batch(model_config.num_patches + 1, mae.encoder.embed_dim, gpu=False)
    # Full batches for every core.
    num_images = -(-config.num_images // (batch * config.cores)) * batch * config.cores
    rounds: dict[str, list[_Round]] = {name: [] for name in _TITLES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mae-bench-")))
        write_images(images, folder / "images", num_images)
        stack.enter_context(only_cores(config.cores))
        pool = stack.enter_context(ProcessPoolExecutor(config.cores, mp_context=get_context("spawn")))
        variants: dict[str, Callable[[], _Round]] = {
            "bare": lambda: _bare(pool, model, batch, num_images, config.cores),
            "ours": lambda: _ours(model, folder, batch, config.cores),
            "timm": lambda: _timm(model, folder / "images", batch, num_images, config.cores),
        }
        variants["bare"]()
        for _ in range(config.rounds):
            for name, variant in variants.items():
                rounds[name].append(variant())
                log.info("%s: %.1f images/s", _TITLES[name], rounds[name][-1].images_per_s)
    return _figures(config, batch, num_images, rounds)


def _bare(pool: ProcessPoolExecutor, model: _Model, batch: int, num_images: int, cores: int) -> _Round:
    jobs = [pool.submit(_encode, model, batch, num_images // cores) for _ in range(cores)]
    spans = [job.result() for job in jobs]
    wall_s = max(stop for _, stop, _ in spans) - min(start for start, _, _ in spans)
    return _Round(num_images, wall_s, sum(cpu_s for *_, cpu_s in spans))


@torch.inference_mode()
def _encode(model: _Model, batch: int, num_images: int) -> tuple[float, float, float]:
    """Encode pixels that are in memory; return start, stop and CPU seconds."""
    torch.set_num_threads(1)
    encoder = _built(model)
    images = torch.from_numpy(_noise(batch, encoder))
    encoder(images)
    started_s, cpu_s = time.monotonic(), time.process_time()
    for _ in range(num_images // batch):
        encoder(images)
    return started_s, time.monotonic(), time.process_time() - cpu_s


@lru_cache(maxsize=1)
def _built(model: _Model) -> Encoder:
    return model.build()


def _noise(batch: int, encoder: Encoder) -> np.ndarray:
    shape = (batch, *encoder.image_px, encoder.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _ours(model: _Model, folder: Path, batch: int, cores: int) -> _Round:
    """Embed the folder on Ray actors, each from the moment when it is ready."""
    config = json.loads(model.config_json)["model"]
    measure = Embedding(
        config_json=model.config_json,
        image_px=tuple(config["image_px"]),
        channels=config["channels"],
        values=None,
        pool="avg",
        last_layers=1,
        patch_tokens=False,
        stored_as="float32",
    )
    with ExitStack() as stack:
        target = open_storage(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        found = open_input(str(folder / "images"), stack)
        work = WorkFolder(target, PURPOSE)
        work.claim({})
        num_parts = work.put_slices(found.parts(4 * batch, batch))
        plan = Plan(
            reader=found.reader,
            work=work,
            target=target,
            measure=measure,
            batch=batch,
            max_pixels=64_000_000,
            threads=1,
            decoders=1,
            gpu=False,
        )
        rows = list(run_parts(range(num_parts), plan, model.weights, ActorConfig(actors=cores), _TimedWorker))
    wall_s = max(row["done_s"] for row in rows) - min(row["ready_s"] for row in rows)
    spent_s = {row["pid"]: row["ready_cpu_s"] for row in rows}
    last_s = {pid: max(row["done_cpu_s"] for row in rows if row["pid"] == pid) for pid in spent_s}
    cpu_s = sum(last_s[pid] - spent_s[pid] for pid in spent_s)
    return _Round(sum(row["num_found"] for row in rows), wall_s, cpu_s)


class _TimedWorker(PartWorker):
    """Warms up, and tells when it was ready and when each part was done."""

    def __init__(self, plan: Plan, weights: Any) -> None:
        super().__init__(plan, weights)
        views = [np.zeros((*plan.measure.image_px, plan.measure.channels), np.uint8)] * plan.batch
        self._values(list(range(plan.batch)), views)
        self._ready = {"ready_s": time.monotonic(), "ready_cpu_s": time.process_time(), "pid": os.getpid()}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        counts = super().__call__(row)
        return counts | self._ready | {"done_s": time.monotonic(), "done_cpu_s": time.process_time()}


def _timm(model: _Model, folder: Path, batch: int, num_images: int, cores: int) -> _Round:
    """Run in a process of its own, so that its threads and workers end with the round."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return _Round(num_images, *pool.submit(_load_and_encode, model, folder, batch, cores).result())


@torch.inference_mode()
def _load_and_encode(model: _Model, folder: Path, batch: int, cores: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of timm's forward pass over a folder, after a first pass of a few batches."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(cores)
    encoder = model.build()
    side_px = encoder.image_px[0]
    steps = [
        transforms.Resize(round(side_px * 256 / 224), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side_px),
        transforms.ToTensor(),
        transforms.Normalize(_IMAGENET.mean, _IMAGENET.std),
    ]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(
        dataset, batch, num_workers=cores, persistent_workers=True, multiprocessing_context=get_context("spawn")
    )
    # The first pass starts the workers, which stay for the second.
    for images, _ in loader:
        if images.shape[0]:
            encoder.vit.forward_features(images[:1])
    encoder.vit.forward_features(torch.zeros(batch, encoder.channels, side_px, side_px))
    started_s, cpu_s = time.monotonic(), _tree_cpu_s()
    for images, _ in loader:
        encoder.vit.forward_features(images)[:, encoder.vit.num_prefix_tokens :].mean(dim=1)
    return time.monotonic() - started_s, _tree_cpu_s() - cpu_s


def _tree_cpu_s() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def _figures(config: EmbedBenchConfig, batch: int, num_images: int, rounds: dict[str, list[_Round]]) -> dict[str, Any]:
    wall = {name: [found.images_per_s for found in done] for name, done in rounds.items()}
    cpu = {name: [found.images_per_cpu_s for found in done] for name, done in rounds.items()}
    found = {
        "machine": machine(),
        "arch": config.arch,
        "image_px": config.image_px,
        "batch": batch,
        "num_images": num_images,
        "cores": config.cores,
        "images_per_s": {name: median(rates) for name, rates in wall.items()},
        "images_per_cpu_s": {name: median(rates) for name, rates in cpu.items()},
        "spread": {name: _spread(rates) for name, rates in cpu.items()},
        "share_of_bare": _ratio(wall["ours"], wall["bare"]),
        "cpu_share_of_bare": _ratio(cpu["ours"], cpu["bare"]),
        "ratio_vs_timm": _ratio(wall["ours"], wall["timm"]),
        "cpu_ratio_vs_timm": _ratio(cpu["ours"], cpu["timm"]),
    }
    lines = [
        f"{config.arch} at {config.image_px} px, batch {batch}, {num_images} images, {config.cores} cores; {machine()}",
        f"  {'':26} images/s  images/CPU s  spread of the latter",
    ]
    for name, title in _TITLES.items():
        lines.append(f"  {title:26} {median(wall[name]):8.2f}  {median(cpu[name]):12.2f}  {_spread(cpu[name]):7.1%}")
    lines.append(
        f"  per CPU second, mae embed is {found['cpu_share_of_bare']:.1%} of the bare encoder and "
        f"{found['cpu_ratio_vs_timm']:.2f} x timm; by the clock {found['share_of_bare']:.1%} and "
        f"{found['ratio_vs_timm']:.2f} x"
    )
    return found | {"text": "\n".join(lines)}


def _spread(rates: Sequence[float]) -> float:
    return (max(rates) - min(rates)) / median(rates)


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the ratio of the medians over rounds."""
    return median(ours) / median(others)
