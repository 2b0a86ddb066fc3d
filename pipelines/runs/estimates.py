"""Estimates of runs: stored below the output folder before a run, compared with what it took at its end."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.config import PretrainConfig
from pipelines.runs.folder import RunFolder
from pipelines.storage import open_storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes, by calculation."""

    name: str
    steps: int
    step_s: float
    hours: float
    num_devices: int
    device: str
    """gpu or cpu. The hours of a CPU worker are those of its threads."""
    device_hours: float
    storage_bytes: int
    """Checkpoints that are kept at the end, and the export."""
    price: float | None = None
    """Of one device for an hour."""

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price

    @property
    def text(self) -> str:
        """The estimate as one line."""
        return (
            f"{self.steps:,} steps of {self.step_s:.3g} s: {_shown(self.hours, self.device_hours, self.device)}, "
            f"{_gb(self.storage_bytes)} of checkpoints and export{_cost(self.cost)}; without waiting for images, "
            "gradient sums over workers, and restarts"
        )


def store(output: str, found: Estimate) -> None:
    """Keep the estimate for the end of the run, in place of an earlier one."""
    open_storage(output).write(_path(found.name), json.dumps(asdict(found), indent=1).encode())


def num_kept(config: PretrainConfig) -> int:
    """Return the number of checkpoints that are kept at the end of a run that saves at the end of epochs."""
    checkpoint = config.checkpoint
    saved = max(1, round(config.epochs / checkpoint.every_epochs))
    permanent = config.epochs // checkpoint.keep_every_epochs if checkpoint.keep_every_epochs else 0
    return min(saved, checkpoint.keep + checkpoint.keep_best + permanent)


def compare(config: PretrainConfig, name: str, folder: RunFolder) -> dict[str, Any]:
    """Log in one line what was estimated of a finished run and what it took; return both, empty without estimate."""
    storage = open_storage(config.output)
    if not storage.exists(_path(name)):
        return {}
    before = Estimate(**json.loads(storage.read(_path(name))))
    clock = folder.checkpoints.meta(folder.checkpoints.latest_step()).get("clock", {}).get("seconds", {})
    hours = sum(clock.values()) / 3600
    kept = sum(size for path, size in folder.storage.list() if path.startswith(("checkpoints/", "export/")))
    took = replace(
        before, hours=hours, device_hours=hours * before.num_devices, storage_bytes=kept,
        step_s=clock.get("steps", 0.0) / max(1, before.steps),
    )  # fmt: skip
    log.info(
        "%s: estimated %s, %s%s; took %s, %s%s, of which steps %.3g h",
        name, _shown(before.hours, before.device_hours, before.device), _gb(before.storage_bytes), _cost(before.cost),
        _shown(took.hours, took.device_hours, took.device), _gb(took.storage_bytes), _cost(took.cost),
        clock.get("steps", 0.0) / 3600,
    )  # fmt: skip
    keys = ("hours", "device_hours", "storage_bytes", "step_s")
    shown = {when: {key: getattr(values, key) for key in keys} for when, values in (("before", before), ("took", took))}
    return {
        "estimate": {
            when: found | {"cost": cost} for (when, found), cost in zip(shown.items(), (before.cost, took.cost))
        }
    }


def _path(name: str) -> str:
    return f".estimates/{name}.json"


def _shown(hours: float, device_hours: float, device: str) -> str:
    return f"{hours:.3g} h, {device_hours:.3g} {device.upper()} hours"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _cost(cost: float | None) -> str:
    return "" if cost is None else f", costs {cost:.2f}"
