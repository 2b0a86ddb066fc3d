"""Options of the commands that measure what a model is worth, and of those that show what it sees."""

from dataclasses import dataclass

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Metrics with bootstrap intervals, pictures and predictions of a classifier on a split of a prepared dataset."""

    model: str = "models:/mae-vit_base_patch16-classifier@candidate"
    """Registered classifier (models:/NAME@ALIAS or models:/NAME/VERSION), or the export/ folder of a run."""
    data: str = ""
    """Prepared dataset: a folder or s3:// prefix written by `mae prepare`. Its classes are matched by name."""
    split: str = "val"
    """Split to evaluate on; use test only once, at the end of a study."""
    batch: int = 64
    """Images per forward pass."""
    gpu: bool = False
    """Run the classifier on the first GPU."""
    num_bins: int = 15
    """Bins of equal width of the confidence, for calibration."""
    num_resamples: int = 1000
    """Resamples of the bootstrap from which each 95 % interval is taken; 0 for no intervals."""
    seed: int = 0
    """Seed of the resamples."""
    log: bool = True
    """Log metrics, report and pictures to MLflow."""
    experiment: str = "mae"
    """MLflow experiment of the run."""

    def __post_init__(self) -> None:
        for name, good in (("batch", 64), ("num_bins", 15)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try {good}")
        if self.num_resamples and self.num_resamples < 100:
            raise UserError(
                f"num_resamples {self.num_resamples} is too few for a 95 % interval; try 1000, or 0 for no intervals"
            )
