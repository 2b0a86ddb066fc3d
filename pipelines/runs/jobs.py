"""A job: one training run as a worker group executes it. What it reads, and in which order, is in `plans`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mae_core.config import ADDED, LAYER_NORM_EPS, Size
from mae_core.normalization import Normalization
from pipelines.config import ClassifyConfig, FixedCompute, PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Extended:
    """The finished run after whose end a job continues, from its last checkpoint."""

    run: str
    """Id of the run, from its run.json."""
    epochs: int
    """Epochs trained before, those of runs that it extends included."""
    end_lr: float
    """Learning rate at which the run ended, where the job's warm-up starts."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Pretraining run, ready for a worker group."""

    folder: str
    """URI of the run's folder."""
    config: PretrainConfig
    pixels: Normalization
    backbone: str = field(default="", metadata=ADDED)
    """URI of a folder with the weights to start from and the config.json that describes them; empty for random ones."""
    extended: Extended | None = field(default=None, metadata=ADDED)
    """The run that this one extends. Its last checkpoint is then the first in the job's own folder."""
    chosen: FixedCompute = field(default_factory=FixedCompute, metadata=ADDED)
    """What auto stands for in the config's compute options."""
    listed: str = field(default="", metadata=ADDED)
    """Digest of the source and the options of its preparation, during which the first epoch was trained; it is then the
    run's dataset. Empty if the dataset was prepared before."""
    kind: Literal["pretrain"] = "pretrain"

    @property
    def input(self) -> tuple[Size, int]:
        """Image side in px and channels."""
        return self.config.model.image_px, self.config.model.channels

    @property
    def compute(self) -> FixedCompute:
        """Compute options with the chosen value for every auto."""
        return self.config.compute.fixed(self.chosen)

    @property
    def reading(self) -> PretrainConfig:
        """The config whose epochs and batches count decoded images, with the micro-batch of `compute`."""
        config, micro_batch = self.config, self.compute.micro_batch
        if micro_batch is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch=micro_batch))
        return config.reading

    @property
    def first_epoch(self) -> int:
        """The job's first epoch, counted in decoded images: 0 unless it extends a run.

        Order, crops and masks are keyed by the epoch, so an extension repeats none of those that the run has used.
        """
        return self.extended.epochs // self.config.views_per_image if self.extended else 0

    @property
    def stages(self) -> tuple[tuple[int, Size], ...]:
        """First epoch of each size of images, counted as `first_epoch`, and the size; one unless they grow."""
        reading = self.reading
        found = reading.progressive.stages(reading.epochs, reading.model)
        return tuple((self.first_epoch + epoch, size) for epoch, size in found)


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """Fine-tuning or probing run, ready for a worker group.

    Everything that depends on the backbone is already read from its config.
    """

    folder: str
    """URI of the run's folder."""
    config: ClassifyConfig
    arch: str
    """Encoder architecture, such as vit_base_patch16."""
    image_px: Size
    channels: int
    pixels: Normalization
    classes: tuple[str, ...]
    backbone: str
    """URI of a folder with encoder.safetensors; empty for a random encoder."""
    backbone_px: Size
    """Image size of the backbone, whose positions are resized to `image_px`."""
    norm_eps: float = field(default=LAYER_NORM_EPS, metadata=ADDED)
    """Epsilon of the backbone's layer norms."""
    label_sets: tuple[tuple[int, ...], ...] = field(default=(), metadata=ADDED)
    """With several classes an image, the classes that each stored label means."""
    chosen: FixedCompute = field(default_factory=FixedCompute, metadata=ADDED)
    """What auto stands for in the config's compute options."""
    kind: Literal["classify"] = "classify"

    @property
    def input(self) -> tuple[Size, int]:
        """Image side in px and channels."""
        return self.image_px, self.channels

    @property
    def compute(self) -> FixedCompute:
        """Compute options with the chosen value for every auto."""
        return self.config.compute.fixed(self.chosen)

    @property
    def reading(self) -> ClassifyConfig:
        """The config whose epochs and batches count decoded images; for a classifier, its own."""
        return self.config

    @property
    def first_epoch(self) -> int:
        """The job's first epoch, always 0: a classifier extends no run."""
        return 0

    @property
    def caches_features(self) -> bool:
        """Whether each image's features are computed once: for kNN, and in a probe without random augmentation."""
        method = self.config.classifier.method
        return method == "knn" or (method == "probe" and not self.config.augment.is_random)


Job = PretrainJob | ClassifyJob


def with_workers(job: Job, num_workers: int) -> Job:
    """Return a copy of the job for a group of `num_workers` workers."""
    config = job.config
    compute = dataclasses.replace(config.compute, num_workers=num_workers)
    return dataclasses.replace(job, config=dataclasses.replace(config, compute=compute))
