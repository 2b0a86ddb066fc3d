"""What would bound a training step on this machine: the step itself, by count, or the decoding of its images.

1. The rate of the largest matrix product is measured for a moment, on the device that auto chooses.
2. A step takes its counted operations at the share of that rate that was measured (docs/benchmarks.md).
3. One core decodes a drawn photograph of 500 x 375 px for a moment; data tasks decode as often as there are cores.
"""

import io
import time

import numpy as np
import torch
from PIL import Image

from mae_core.bench.flops import step_flops
from mae_core.bench.timing import MatrixMultiply
from pipelines.config import FixedCompute, PretrainConfig
from pipelines.images.decode import decode
from pipelines.machine import Machine

_MFU = {"cuda": 0.39, "cpu": 0.9}
"""Share of the product's rate that a step of ViT-B/16 reaches, compiled on an H200 and eager on two CPU cores."""
_DECODING_S = 0.3


def step_bound(config: PretrainConfig, compute: FixedCompute, machine: Machine) -> str:
    """Say how many images per second a step of the config's model takes, how many are decoded, and which is less."""
    device = torch.device("cuda" if compute.gpu else "cpu")
    steps_per_s = product_flops_s(device, compute) * _MFU[device.type] / step_flops(config.model)
    trained = compute.num_workers * steps_per_s
    cores = min(compute.data_tasks, max(1, machine.num_cores - compute.num_workers))
    decoded = cores * decoded_per_s() * config.views_per_image
    bound = "the step" if trained <= decoded else "decoding"
    return (
        f"{bound} would bound {config.model.arch} at {config.model.image_px[0]} px: {trained:,.0f} images/s by count, "
        f"{decoded:,.0f} decoded by {cores} core{'s' * (cores > 1)}"
    )


def product_flops_s(device: torch.device, compute: FixedCompute) -> float:
    """Measure the rate of the fastest square matrix product, in operations per second, with the worker's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(compute.threads)
    try:
        return MatrixMultiply.fastest_rate(device, getattr(torch, compute.precision))
    finally:
        torch.set_num_threads(before)


def decoded_per_s() -> float:
    """Measure how many photographs one core decodes per second."""
    content = _photograph()
    started_s, count = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - started_s) < _DECODING_S:
        decode(content, 3)
        count += 1
    return count / passed_s


def _photograph() -> bytes:
    """Draw a JPEG with the size and about the bytes of a photograph of ImageNet: 500 x 375 px, 110 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (188, 250, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
    return file.getvalue()
