"""What the measurements of `mae bench` take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_core.errors import UserError


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
            raise UserError("budget_s and seeds must be positive and shares within [0, 1]; try 600, 3 and 0.4 1.0")
        if self.labels_per_class < 1:
            raise UserError(f"labels_per_class {self.labels_per_class} is below 1; try 500")


@dataclass(frozen=True, kw_only=True)
class DataBenchConfig:
    """What `mae bench data` measures."""

    source: Path | None = None
    """Folder of images to measure on; without it imagenet-sample.tar of ../shared/data, or of MAE_TEST_DATA."""
    max_images: int = 250
    """At most so many images are decoded in a round."""
    rounds: int = 9
    """Rounds in which all contenders take turns; figures are medians over them."""
    whole_path: bool = True
    """Also measure the way from shards in S3 through Ray Data to this process, against torch's DataLoader."""
    cores: int = 2
    """Cores that all processes of each whole path share: Ray and the S3 server, or DataLoader's workers."""
    epoch_images: int = 4096
    """Images of an epoch on the whole path; the source's, each as often as needed."""
    gpu_images_per_s: float = 1500.0
    """The training rate of one GPU, for which the cores that feed it are counted."""

    def __post_init__(self) -> None:
        for name in ("max_images", "rounds", "cores", "epoch_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 1")
