"""`mae bench data`: rate of decoding and cropping images, per core and on the whole path from S3 to training."""

import logging
import platform
import tarfile
import tempfile
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from pipelines.bench.config import DataBenchConfig
from pipelines.bench.decoding import Decoding, measure_decoding
from pipelines.bench.loading import Loading, measure_loading
from pipelines.images.decode import SUFFIXES, inspect

log = logging.getLogger(__name__)

_SAMPLE = "imagenet-sample.tar"


def run(config: DataBenchConfig) -> dict[str, Any]:
    """Measure; return the numbers, and a table of them in `text`. Raises UserError if the source has no image."""
    images = list(sample_images(config.source, config.max_images))
    if not images:
        raise UserError(f"no readable image in {config.source}; give a folder that has images")
    log.info("decoding %d images, %d rounds", len(images), config.rounds)
    decoding = measure_decoding(images, config.rounds)
    found: dict[str, Any] = {"machine": machine(), "num_images": len(images), **decoding.figures()}
    lines = [*_decoding_lines(decoding), _feeding_line(decoding, config.gpu_images_per_s)]
    if config.whole_path:
        with tempfile.TemporaryDirectory(prefix="mae-bench-") as folder:
            loading = measure_loading(images, Path(folder), config.cores, config.epoch_images, config.rounds)
        found |= loading.figures()
        lines += ["", *_loading_lines(loading)]
    return {**found, "text": "\n".join([f"{len(images)} images; {found['machine']}", *lines])}


def sample_images(source: Path | None, max_images: int) -> Iterator[bytes]:
    """Yield encoded images, skipping broken ones."""
    num_found = 0
    for content in _files(source):
        try:
            inspect(content)
        except ValueError:
            continue
        yield content
        num_found += 1
        if num_found == max_images:
            return


def _files(source: Path | None) -> Iterator[bytes]:
    if source is not None:
        if not source.is_dir():
            raise UserError(f"source {source} is not a folder; give a folder of images")
        yield from (path.read_bytes() for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES)
        return
    sample = Path(environ.get("MAE_TEST_DATA", "../shared/data")) / _SAMPLE
    if not sample.is_file():
        raise UserError(f"{sample} does not exist; give a folder of images by --source, or set MAE_TEST_DATA")
    with tarfile.open(sample) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield file.read()


def _decoding_lines(decoding: Decoding) -> Iterator[str]:
    yield "decode + random crop 224 + flip, one core (CPU time):"
    yield f"  {'':34} images/s  spread   x PIL   x torchvision.io   bytes"
    for name, variant in decoding.variants.items():
        yield (
            f"  {variant.title:34} {decoding.images_per_s(name):8.0f}  {decoding.spread(name):5.0%}  "
            f"{decoding.ratio(name, 'pil'):6.2f}  {decoding.ratio(name, 'torchvision_io'):16.2f}  "
            f"{decoding.bytes_ratio(name):6.3f}"
        )
    difference = decoding.difference
    yield (
        f"  against PIL on the same crops: {difference.psnr_db:.1f} dB, mean {difference.mean:.4f}, "
        f"maximum {difference.maximum} of 255"
    )
    yield (
        f"  preparing takes {decoding.prepare_ms['sliced']:.1f} ms more per image with a JPEG index than without, "
        f"{decoding.prepare_ms['restarts']:.1f} ms more with restart markers"
    )


def _feeding_line(decoding: Decoding, gpu_images_per_s: float) -> str:
    cores = gpu_images_per_s / decoding.images_per_s("sliced")
    return f"  a GPU that trains on {gpu_images_per_s:.0f} images/s needs {cores:.1f} decoding cores"


def _loading_lines(loading: Loading) -> Iterator[str]:
    yield f"from {loading.where} through Ray Data to this process, {loading.cores} cores (wall-clock time):"
    yield f"  {'':34} images/s  spread"
    for name, title in (
        ("ray", "shards, Ray Data"), ("dataloader", "folder, DataLoader of ImageFolder"), ("bare", "bare decode")
    ):  # fmt: skip
        yield f"  {title:34} {loading.images_per_s(name):8.0f}  {loading.spread(name):5.0%}"
    yield (
        f"  {loading.ratio('dataloader'):.2f} x DataLoader; {loading.share_of_bare:.0%} of the bare decode rate per "
        f"core used, {loading.ratio('bare'):.0%} by the wall clock, in which the S3 server takes "
        f"{loading.store_share:.0%} of the cores"
    )
    yield (
        f"  first batch after {loading.first_batch_s:.2f} s with warm workers; between epochs "
        f"{loading.epoch_gap_s:.3f} s, between other batches at most {loading.batch_gap_s:.3f} s (medians)"
    )


def machine() -> str:
    import simplejpeg
    import torch
    import torchvision
    from PIL import Image

    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown CPU")
    versions = f"Pillow {Image.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{model}; Python {platform.python_version()}, {versions}, simplejpeg {simplejpeg.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
