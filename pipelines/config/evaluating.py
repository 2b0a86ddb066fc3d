"""Options of what measures a model's worth, as a command or while it is trained, and of what shows what it sees."""

import math
from dataclasses import dataclass
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PeriodicEvaluationConfig:
    """What the encoder is worth while it is pretrained: a linear probe and RankMe on fixed images, beside training."""

    every_epochs: int = 0
    """Epochs between two evaluations, of which the last step has one too; 0 for none. Training does not wait for them:
    if one lasts longer than this, the newest weights wait for it and those between are skipped."""
    images: int = 2000
    """Labelled training images on which the probe is fitted, as many of each class, chosen by the seed; at most as many
    held-out ones test it. They are of val or, without it, training images on which no probe is fitted."""
    pool: Literal["avg", "token"] = "avg"
    """avg: the mean of the patch tokens; token: the class token."""
    knn: bool = False
    """Also classify by the 20 nearest images. It says little of MAE: a ViT-B after 100 epochs has 11.2 % by kNN, 46.0 %
    by a linear probe and 81.3 % fine-tuned."""
    threads: int = 1
    """CPU threads of an evaluation, which runs at the lowest priority on the node of rank 0."""
    gpu: bool = False
    """Evaluate on a GPU of the cluster that no worker holds, and wait until there is one."""
    wait_s: float = 600.0
    """Seconds for which a trained run waits for its last evaluation; then it ends without it."""

    def __post_init__(self) -> None:
        if self.every_epochs < 0:
            raise UserError(f"every_epochs {self.every_epochs} is negative; try 10, or 0 for no evaluation")
        if self.images < 2:
            raise UserError(f"images {self.images} is below 2; try 2000")
        if self.threads < 1:
            raise UserError(f"threads {self.threads} is below 1; try 1")
        if not 0 <= self.wait_s < math.inf:
            raise UserError(f"wait_s {self.wait_s:g} is not a number of seconds from 0 up; try 600")


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


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """Pictures of what an encoder sees: principal components of patch tokens, attention of the class token."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone (models:/NAME@ALIAS or models:/NAME/VERSION), or the export/ folder of a run."""
    num_images: int = 12
    """Most images to draw, spread evenly over the folder; the components are fitted over all of them."""
    image_px: tuple[int, int] | None = None
    """Height and width of the input, multiples of the patch; if not set, those of the backbone. Larger inputs make
    finer pictures; positions are resized."""
    gpu: bool = False
    """Run the encoder on the first GPU."""
    log: bool = False
    """Log the pictures to MLflow."""
    experiment: str = "mae"
    """MLflow experiment of the run."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= 1000:
            raise UserError(f"num_images {self.num_images} is outside [1, 1000]; try 12")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """A linear segmentation probe on frozen patch tokens: mIoU and pictures."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone (models:/NAME@ALIAS or models:/NAME/VERSION), or the export/ folder of a run."""
    image_px: tuple[int, int] | None = None
    """Height and width of the input, multiples of the patch, to which images are stretched; if not set, those of the
    backbone. Larger inputs give finer predictions; positions are resized."""
    val_fraction: float = 0.2
    """Share of the images held out by the seed, if there are no folders train/ and val/."""
    epochs: int = 40
    """Passes over the training images."""
    batch: int = 16
    """Images per step."""
    lr: float = 1e-3
    """AdamW's learning rate at the start of the cosine."""
    weight_decay: float = 1e-4
    """Weight decay of the linear layer."""
    num_pictures: int = 8
    """Validation images to draw beside their predictions and masks, spread evenly."""
    seed: int = 0
    """Seed of the held-out images, the head, and the order of images."""
    gpu: bool = False
    """Compute on the first GPU."""
    log: bool = True
    """Log metrics and pictures to MLflow."""
    experiment: str = "mae"
    """MLflow experiment of the run."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction {self.val_fraction} is outside (0, 1); try 0.2")
        for name, good in (("epochs", 40), ("batch", 16), ("num_pictures", 8)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try {good}")
        if not self.lr > 0:
            raise UserError(f"lr {self.lr:g} is not positive; try 1e-3")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay {self.weight_decay:g} is negative; try 1e-4, or 0 for none")
