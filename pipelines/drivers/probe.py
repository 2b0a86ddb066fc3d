"""The driver of linear probing: how good a backbone's frozen features are."""

from typing import Any

from pipelines.config import ClassifyConfig
from pipelines.drivers.finetune import finetune


def probe(config: ClassifyConfig, preset: str, *, fresh: bool = False) -> dict[str, Any]:
    """The run's outcome: top-1 of a linear classifier on frozen features. Nothing is registered."""
    return finetune(config, preset, fresh=fresh)
