"""Measurement of a model's training step against others, as plain values and as a table."""

import gc
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.bench.config import StepConfig
from mae_core.bench.flops import plain_flops, step_flops
from mae_core.bench.profile import most_expensive
from mae_core.bench.timing import MatrixMultiply, interleaved, median_interval, ratio, spread
from mae_core.bench.variants import Variant, input_images, variants
from mae_core.config import ModelConfig
from mae_core.errors import UserError

Times = NDArray[np.float64]

_WARM_UP_STEPS = 3
_ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


@dataclass
class _Entry:
    """A variant after its warm-up."""

    variant: Variant
    first_loss: float
    peak_memory_bytes: int | None


def measure(config: StepConfig) -> Iterator[dict[str, Any]]:
    """Yield one object of plain values per model: rates, ratios, operation counts, memory."""
    for arch in config.model:
        yield _measure_model(config, arch)
        gc.collect()


def _measure_model(config: StepConfig, arch: str) -> dict[str, Any]:
    device = _device(config)
    model, images = config.of(arch), input_images(config, device)
    entries = [_warmed(build(config, model, images), device) for build in variants(config)]
    _check_losses(config, entries)
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    product = MatrixMultiply.fastest(device, getattr(torch, config.precision), clock)
    steps = [_steps(entry.variant, config.steps_per_round) for entry in entries]
    *rows, product_s = interleaved([*steps, product], config.rounds, device, clock)
    times_s = {entry.variant.name: row / config.steps_per_round for entry, row in zip(entries, rows)}
    return {
        "model": arch,
        **_rates(config, model, times_s["ours"], product.flops / product_s),
        **_ratios(times_s),
        "peak_memory_bytes": entries[0].peak_memory_bytes,
        "contenders": {
            entry.variant.name: {
                **_times(config, times_s[entry.variant.name]),
                "peak_memory_bytes": entry.peak_memory_bytes,
                "first_loss": entry.first_loss,
            }
            for entry in entries
        },
        "profile": most_expensive(steps[0], config.profile, device) if config.profile else [],
        "setting": {name: value for name, value in vars(config).items() if name not in ("model", "device")},
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _rates(config: StepConfig, model: ModelConfig, ours_s: Times, matmul_flop_s: Times) -> dict[str, Any]:
    """Compute images/s, operations/s, and MFU: the share of the rate that a matrix product reaches."""
    flops = step_flops(model)
    images_per_s = config.batch / float(np.median(ours_s))
    most = float(np.median(matmul_flop_s))
    return {
        "images_per_s": images_per_s,
        "flops_per_image": flops,
        "flops_ratio": plain_flops(model) / flops,
        "flop_per_s": flops * images_per_s,
        "matmul_flop_per_s": most,
        "mfu": flops * images_per_s / most,
        "mfu_interval": list(median_interval(flops * config.batch / ours_s / matmul_flop_s)),
    }


def _ratios(times_s: dict[str, Times]) -> dict[str, Any]:
    """Compute the speed of ours relative to each of the others; None for one that was not timed."""
    found: dict[str, Any] = {}
    for name in ("plain", "transformers"):
        there = ratio(times_s[name], times_s["ours"]) if name in times_s else None
        found[f"ratio_vs_{name}"] = there and there.of_medians
        found[f"ratio_vs_{name}_interval"] = there and [there.low, there.high]
    return found


def _times(config: StepConfig, step_s: Times) -> dict[str, float]:
    middle_s = float(np.median(step_s))
    return {"images_per_s": config.batch / middle_s, "step_s": middle_s, "spread": spread(step_s)}


def _device(config: StepConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is not available; try --device cpu, or a host with a GPU")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if config.device == "auto" else config.device)


def _warmed(variant: Variant, device: torch.device) -> _Entry:
    """Run a few steps (compilation, autotuning, optimizer state), then measure peak memory on a GPU."""
    first_loss = float(variant.step())
    for _ in range(_WARM_UP_STEPS):
        variant.step()
    if device.type != "cuda":
        return _Entry(variant, first_loss, None)
    # Count this variant's memory only: the weights, gradients and moments of the others stay allocated.
    own = sum(p.numel() * p.element_size() for g in variant.optimizer.param_groups for p in g["params"])
    own += sum(v.numel() * v.element_size() for s in variant.optimizer.state.values() for v in s.values())
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.step()
    return _Entry(variant, first_loss, own + torch.cuda.max_memory_allocated(device) - before)


def _check_losses(config: StepConfig, entries: list[_Entry]) -> None:
    """Check that ours and the plain computation agree to rounding if they are mathematically equal."""
    losses = {entry.variant.name: entry.first_loss for entry in entries}
    if "plain" not in losses or not config.same_mathematics:
        return
    allowed = max(_ROUNDING[entry.variant.precision] for entry in entries)
    if not abs(losses["ours"] - losses["plain"]) <= allowed * abs(losses["plain"]):
        raise RuntimeError(f"loss {losses['ours']} differs from the plain computation's {losses['plain']}; do not use")


def _steps(variant: Variant, num_steps: int) -> Any:
    def run() -> None:
        for _ in range(num_steps):
            variant.step()

    return run


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def table(found: dict[str, Any]) -> str:
    """Format one model's numbers as a table."""
    setting = found["setting"]
    lines = [
        f"{found['model']} at {setting['image_px']} px, batch {setting['batch']}, {setting['precision']}, "
        f"decoder {setting['decoder_depth']} x {setting['decoder_width']} ({setting['decoder_attention']}), "
        f"{setting['compile']}; {found['device']}, torch {found['versions']['torch']}",
        f"  {'':<14}{'images/s':>10}{'step ms':>10}{'spread':>8}{'peak MiB':>10}  ours is faster by (95 %)",
    ]
    for name, entry in found["contenders"].items():
        memory = entry["peak_memory_bytes"]
        faster = ""
        if name != "ours":
            low, high = found[f"ratio_vs_{name}_interval"]
            faster = f"{found[f'ratio_vs_{name}']:.3f} ({low:.3f} to {high:.3f})"
        lines.append(
            f"  {name:<14}{entry['images_per_s']:>10.1f}{1e3 * entry['step_s']:>10.1f}{entry['spread']:>8.1%}"
            f"{'-' if memory is None else round(memory / 2**20):>10}  {faster}"
        )
    low, high = found["mfu_interval"]
    lines.append(
        f"  {found['flops_per_image'] / 1e9:.3f} GFLOP per image, {found['flops_ratio']:.3f} x as many in the plain "
        f"computation; {found['flop_per_s'] / 1e9:,.0f} GFLOP/s of {found['matmul_flop_per_s'] / 1e9:,.0f} in a matrix "
        f"product: MFU {found['mfu']:.1%} ({low:.1%} to {high:.1%})"
    )
    lines += [f"  {entry['share']:>6.1%}  {entry['operation']}" for entry in found["profile"]]
    return "\n".join(lines)
