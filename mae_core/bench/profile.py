"""Profile of a step by operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_STEPS = 3


def most_expensive(step: Callable[[], object], count: int, device: torch.device) -> list[dict[str, Any]]:
    """List the `count` operations (kernels on a GPU) with the largest self time, each with its share of the step."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    own = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(own.values())
    ranked = sorted(own.items(), key=lambda item: -item[1])[:count]
    return [{"operation": name, "share": time / total} for name, time in ranked]
