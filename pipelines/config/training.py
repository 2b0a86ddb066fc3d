"""Options of pretraining, and of training classifiers."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from mae_core.config import ADDED, AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig, parse_arch
from mae_core.errors import UserError
from pipelines.config.data import DataConfig, PrepareConfig
from pipelines.config.evaluating import PeriodicEvaluationConfig
from pipelines.config.progressive import ProgressiveConfig, shown
from pipelines.config.running import CheckpointConfig, ComputeConfig, TrackingConfig


def _check_epochs(epochs: int, optim: OptimConfig) -> None:
    if epochs < 1:
        raise UserError(f"epochs {epochs} is below 1; try 1")
    if optim.warmup_epochs > epochs:
        raise UserError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} exceeds epochs {epochs}; try {max(0, epochs // 10)}"
        )
    if optim.schedule == "constant" and optim.warmup_epochs + optim.decay_share * epochs > epochs * (1 + 1e-9):
        raise UserError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} and optim.decay_share {optim.decay_share:g} overlap in "
            f"{epochs} epochs; try --optim.decay-share {1 - optim.warmup_epochs / epochs:.2g}"
        )


def _check_labels(labels: str, per_class: int | None) -> None:
    is_share = re.fullmatch(r"[0-9]+(\.[0-9]+)?%", labels) is not None and 0 < float(labels[:-1]) <= 100
    if labels and not is_share:
        raise UserError(
            f"labels {labels!r} is no percentage above 0; try 1%, or --data.labels-per-class 20 for a count per class"
        )
    if labels and per_class is not None:
        raise UserError(f"labels {labels} and data.labels_per_class {per_class} exclude each other; leave one out")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked-autoencoder pretraining (He et al. 2021, Table 8)."""

    name: str = ""
    """Name of the run; if empty, the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix for the checkpoints and metrics of runs."""
    seed: int = 0
    """Seed of initial weights, sample order, crops and masks."""
    epochs: int = 800
    """Passes over the training split. With extend, those after the end of the extended run, which are not counted."""
    extend: str = field(default="", metadata=ADDED)
    """Finished run to continue after its end, with its model, images and optimizer state and a learning-rate schedule
    of its own: a run folder, or the name of a run under output. Fields that are not stated are those of that run."""
    backbone: str = field(default="", metadata=ADDED)
    """Registered model to continue from (models:/NAME@ALIAS or models:/NAME/VERSION): its weights are the initial ones
    where they fit. `mae pretrain` accepts --model as another name. If empty, the weights are random."""
    masks_per_image: int = 1
    """Masks per crop of a decoded image, all used in the same step. Batch and epochs still count masked images."""
    complementary_masks: bool = field(default=False, metadata=ADDED)
    """Let the masks of a crop see different patches, and all of them together: masks_per_image x visible patches must
    be all patches, as with 4 masks of 75 %. Otherwise masks are independent."""
    ema_decay: float | None = field(default=None, metadata=ADDED)
    """Export an exponential moving average of the weights with this decay per step; without a value the weights."""
    crops_per_image: int = 1
    """Crops per decoded image, each with its own masks, all used in the same step; counted in the same way."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset and batch."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig, metadata=ADDED)
    """Options of `mae prepare` for a source that is prepared in data.cache; without a cache they have no effect."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model, mask and target."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation; the paper uses only a random resized crop and a flip."""
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig, metadata=ADDED)
    """Smaller images in the first epochs."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Workers and precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    evaluate: PeriodicEvaluationConfig = field(default_factory=PeriodicEvaluationConfig, metadata=ADDED)
    """Evaluation while pretraining."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs, self.optim)
        if self.backbone and not self.backbone.startswith("models:/"):
            raise UserError(
                f"backbone {self.backbone!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION; "
                "try models:/mae-vit_base_patch16@candidate"
            )
        if self.extend and self.backbone:
            raise UserError(
                f"extend {self.extend!r} and backbone {self.backbone!r} exclude each other; try --extend alone for the "
                "same model with its optimizer state, or --model alone for new ones"
            )
        self._check_cache()
        for name in ("rand_augment", "erase", "mixup", "cutmix", "label_smoothing"):
            if getattr(self.augment, name):
                raise UserError(f"augment.{name} is for classifiers, and pretraining has no labels; leave it out")
        for name in ("masks_per_image", "crops_per_image"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 4, or 1 for the paper's")
        if self.crops_per_image > 1 and self.augment.crop == "none":
            raise UserError("crops_per_image needs a random crop; try --augment.crop random_resized, or 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay {self.ema_decay} is outside (0, 1); try 0.9999, or leave it out for none")
        self._check_complementary(self.model)
        views = self.views_per_image
        by = "masks_per_image" if self.crops_per_image == 1 else "masks_per_image x crops_per_image"
        for name, count in (("epochs", self.epochs), ("data.micro_batch", self.data.micro_batch)):
            if count % views:
                raise UserError(f"{name} {count} is not a multiple of {by} {views}; try {-(-count // views) * views}")
        self._check_progressive(self.epochs // views)

    def _check_cache(self) -> None:
        """Raise UserError for what needs the whole dataset before the first step, if that is still to be prepared."""
        data = self.data
        if not data.cache:
            return
        if self.extend:
            data.refuse_cache(f"extend {self.extend}")
        if self.prepare.tile_px is not None:
            data.refuse_cache("prepare.tile_px")
        if self.model.target == "pca":
            data.refuse_cache("model.target pca")
        if data.labels_per_class is not None:
            data.refuse_cache("data.labels_per_class")

    def _check_progressive(self, epochs: int) -> None:
        self.progressive.check(epochs, self.model)
        for _, size in self.progressive.stages(epochs, self.model)[:-1]:
            try:
                self._check_complementary(dataclasses.replace(self.model, image_px=size))
            except UserError as error:
                raise UserError(f"images of {shown(size)} in the first epochs: {error}") from None

    def _check_complementary(self, model: ModelConfig) -> None:
        if not self.complementary_masks:
            return
        num = self.masks_per_image
        if self.crops_per_image > 1 or model.mask.kind != "random":
            raise UserError(
                f"complementary_masks need random masks of one crop, not {model.mask.kind} ones of "
                f"{self.crops_per_image}; try --crops-per-image 1 --model.mask.kind random"
            )
        if num < 2 or num * model.num_visible != model.num_patches:
            fitting = [n for n in range(2, model.num_patches + 1) if model.num_patches % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - max(num, 2)), default=0)
            raise UserError(
                f"{num} complementary masks with {model.num_visible} visible patches each are not all "
                f"{model.num_patches} patches; try --masks-per-image {nearest} --model.mask.ratio "
                f"{1 - 1 / max(nearest, 2):.6g}"
            )

    @property
    def views_per_image(self) -> int:
        """Number of masked images per decoded image."""
        return self.masks_per_image * self.crops_per_image

    @property
    def reading(self) -> "PretrainConfig":
        """The same run counted in decoded images instead of masked ones.

        One pass over the decoded images stands for `views_per_image` epochs. The number of steps, masked images per
        step, learning rates and all durations in samples are unchanged.
        """
        views = self.views_per_image
        if views == 1:
            return self
        data, optim, replace = self.data, self.optim, dataclasses.replace
        return replace(
            self,
            epochs=self.epochs // views,
            masks_per_image=1,
            complementary_masks=False,
            crops_per_image=1,
            data=replace(data, batch=data.batch // views, micro_batch=data.micro_batch // views),
            optim=replace(optim, base_lr=optim.base_lr * views, warmup_epochs=optim.warmup_epochs / views),
            checkpoint=replace(self.checkpoint, every_epochs=self.checkpoint.every_epochs / views),
            tracking=replace(
                self.tracking, pictures_every_epochs=max(1, round(self.tracking.pictures_every_epochs / views))
            ),
            evaluate=replace(self.evaluate, every_epochs=-(-self.evaluate.every_epochs // views)),
        )


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Training a classifier on labelled images: fine-tuning, linear probing or from scratch (Tables 9 to 11)."""

    name: str = ""
    """Name of the run; if empty, the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix for the checkpoints and metrics of runs."""
    backbone: str = "models:/mae-vit_base_patch16@candidate"
    """Registered model to start from (models:/NAME@ALIAS or models:/NAME/VERSION), or random:<arch> to train from
    scratch. `mae finetune` and `mae probe` accept --model as another name."""
    image_px: tuple[int, int] | None = None
    """Height and width of the input; if not set, those of the backbone (for random, those of the stored images)."""
    labels: str = field(default="", metadata=ADDED)
    """Share of each class's training images to use, such as 1%: at least one image, chosen by the seed; 1% is part of
    10%. All if empty. For a count per class, use data.labels_per_class."""
    seed: int = 0
    """Seed of labelled subset, head, sample order, augmentation, mixup and drop path."""
    epochs: int = 100
    """Passes over the training split."""
    data: DataConfig = field(default_factory=lambda: DataConfig(batch=1024))
    """Dataset and batch."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Which layers are trained, and the features that are classified."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            base_lr=5e-4, min_lr=1e-6, warmup_epochs=5.0, betas=(0.9, 0.999), layer_decay=0.65
        )
    )
    """Optimizer and schedule."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(scale=(0.08, 1.0)))
    """Augmentation of training images."""
    eval_split: Literal["val", "test"] = "val"
    """Split for the final accuracy; use test only once, at the end of a study."""
    eval_every_epochs: int = 10
    """Epochs between two evaluations on val during training."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Workers and precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs, self.optim)
        if self.image_px is not None and min(self.image_px) < 1:
            raise UserError(f"image_px {self.image_px[0]} x {self.image_px[1]} is below 1; try 224 224")
        if self.eval_every_epochs < 1:
            raise UserError(f"eval_every_epochs {self.eval_every_epochs} is below 1; try 10")
        _check_labels(self.labels, self.data.labels_per_class)
        self.data.refuse_cache("a classifier")
        if self.backbone.startswith("random:"):
            parse_arch(self.backbone.removeprefix("random:"))
        elif not self.backbone.startswith("models:/"):
            raise UserError(
                f"backbone {self.backbone!r} is neither models:/NAME@ALIAS, models:/NAME/VERSION nor random:<arch>; "
                "try models:/mae-vit_base_patch16@candidate"
            )

    @property
    def label_share(self) -> float | None:
        """Share of each class's training images to use, from 0 to 1; None if `labels` is empty."""
        return float(self.labels[:-1]) / 100 if self.labels else None


PROBE = ClassifyConfig(
    epochs=90,
    data=DataConfig(batch=16384, micro_batch=512),
    classifier=ClassifierConfig(method="probe", pool="token", head_std=0.01),
    optim=OptimConfig(name="lars", base_lr=0.1, warmup_epochs=10.0, weight_decay=0.0),
    augment=AugmentConfig(scale=(0.08, 1.0)),
)
"""Linear probing as in Table 10; the default of `mae probe`."""
