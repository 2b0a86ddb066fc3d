"""What the measurements of `mae bench` take."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """Pretraining recipes given equal time, in this process and with one worker, and judged by a linear probe."""

    uri: str = ""
    """Prepared dataset with labels."""
    recipes: tuple[str, ...] = ("nano", "nano_fast")
    """Presets or YAML files for `mae pretrain`; their epochs are left aside, time ends each run."""
    probe: str = "nano_probe"
    """Preset of the linear probe; its images never vary."""
    labels_per_class: int = 500
    """Labelled training images of each class that the probe learns from."""
    eval_split: str = "val"
    """Split on which the probe is measured."""
    budget_s: float = 600.0
    """Seconds of pretraining that count as all; learning rates follow the share of it that is spent."""
    shares: tuple[float, ...] = (0.4, 1.0)
    """Shares of the budget, each a run of its own; 0 probes the encoder as it was initialised."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1 and so on."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor seconds, for one thread (OMP_NUM_THREADS=1) of a machine that others use too."""
    out: str = "recipes.jsonl"
    """File with a line for every run; the same command again does only what it lacks."""

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.seeds < 1 or not self.shares or not all(0 <= s <= 1 for s in self.shares):
            raise ValueError("budget_s and seeds must be positive and shares within [0, 1]; try 600, 3 and 0.4 1.0")
        if self.labels_per_class < 1:
            raise ValueError(f"labels_per_class {self.labels_per_class} is below 1; try 500")
