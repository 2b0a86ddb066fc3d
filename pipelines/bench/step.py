"""`mae bench step`: the benchmark of `python -m mae_core.bench` as a command."""

import logging
from typing import Any

from mae_core.bench.config import StepConfig
from mae_core.bench.step import measure, table

log = logging.getLogger(__name__)


def run(config: StepConfig) -> dict[str, Any]:
    """Measure the training step of each model; return one object per model in `objects`, and tables in `text`."""
    objects = []
    for found in measure(config):
        log.info("measured %s: %.1f images/s", found["model"], found["images_per_s"])
        objects.append(found)
    return {"objects": objects, "text": "\n".join(map(table, objects))}
