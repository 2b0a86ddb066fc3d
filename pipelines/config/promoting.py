"""Options of the commands that decide which version of a model is used."""

from dataclasses import dataclass
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """Return an alias to the version that it pointed to before."""

    to: str = "champion"
    """Alias that returns to the version before."""
    why: str = ""
    """Reason, kept in the history and as a tag of the version."""
    experiment: str = "mae"
    """MLflow experiment to open."""


@dataclass(frozen=True, kw_only=True)
class LineageConfig:
    """What a version was made from: versions, runs, datasets, commits, licence and origin."""

    out: str = ""
    """Picture of the lineage to write, a path or s3:// URI ending in .png; none if empty."""
    experiment: str = "mae"
    """MLflow experiment to open."""

    def __post_init__(self) -> None:
        if self.out and not self.out.lower().endswith(".png"):
            raise UserError(f"out {self.out!r} must end in .png; try lineage.png")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a version must show, against the version that the alias points to, before the alias moves to it."""

    data: tuple[str, ...] = ()
    """Prepared datasets on which both versions are measured, with the same images and seeds."""
    split: Literal["val", "test"] = "val"
    """Split of the datasets to measure on."""
    train: str = ""
    """Preset of `mae probe` or `mae finetune` that trains a classifier on each backbone. Registered classifiers are
    measured as they are."""
    labels: tuple[str, ...] = ("",)
    """Shares of each class's training images to train with, such as 1%; empty for all. Each is a setting of its own."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; an image counts with the share of seeds that classify it correctly."""
    metric: Literal["top1", "balanced_accuracy"] = "top1"
    """Metric, in percent."""
    min_value: float = 0.0
    """Least value of the metric in every setting, also for the first version that gets the alias."""
    min_gain: float = 0.0
    """Least gain in points over the present version: the low end of its 95 % interval must reach it in every setting.
    A negative one allows what is not worse by more."""
    max_class_loss: float = 5.0
    """Most points of accuracy that any class may lose: the low end of its 95 % interval must not exceed it, so that a
    class of few images is not refused for chance."""
    max_cost: float = 1.0
    """Most operations per image of the encoder, as a multiple of the present version's."""
    num_resamples: int = 1000
    """Resamples of the paired bootstrap from which intervals are taken."""

    def __post_init__(self) -> None:
        for name in ("labels", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name} {list(getattr(self, name))} is empty or names one twice; list each once")
        if self.num_resamples < 100:
            raise UserError(f"num_resamples {self.num_resamples} is too few for a 95 % interval; try 1000")
        if not self.max_cost > 0:
            raise UserError(f"max_cost {self.max_cost:g} is not positive; try 1.0 for no more than today")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Point an alias to a version that passes a gate against the version that it points to now."""

    to: str = "champion"
    """Alias that moves."""
    gate: str = ""
    """Gate: a shipped preset, or a YAML file with kind: gate."""
    data: tuple[str, ...] = ()
    """Prepared datasets to measure on instead of those of the gate."""
    why: str = ""
    """Reason, kept in the history and as a tag of the version."""
    force: bool = False
    """Move the alias even if the gate refuses, or without a gate. It needs --why."""
    output: str = "runs"
    """Folder or s3:// prefix of the runs that the gate trains. A run that is there already is not trained again."""
    experiment: str = "mae"
    """MLflow experiment of the gate's runs."""

    def __post_init__(self) -> None:
        if self.force and not self.why.strip():
            raise UserError('--force needs a reason for the history; try --why "night images are all wrong"')


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Delete model versions that nothing needs, and uploads that never became a version."""

    name: str = ""
    """Registered model to prune; all if empty. What other models need is kept in any case."""
    keep: int = 3
    """Number of newest versions of each model to keep."""
    older_than_days: float = 30.0
    """Only what was made longer ago is deleted."""
    delete: bool = False
    """Delete what is listed. Without it, it is only listed."""
    experiment: str = "mae"
    """MLflow experiment to open."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep {self.keep} is below 1, and the newest version is always kept; try 3")
        if not self.older_than_days >= 0:
            raise UserError(f"older_than_days {self.older_than_days:g} is negative; try 30")
