"""What the commands take that look at images, models and runs; and the demo."""

from dataclasses import dataclass

from mae_core.errors import UserError
from pipelines.config.running import check_model_name


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Pictures in the manner of Figures 2 and 3: masked | reconstruction | original."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone whose reconstructions are drawn."""
    uri: str = ""
    """Prepared dataset, or a folder of images."""
    split: str = "test"
    """Split of a prepared dataset that images are taken from."""
    ratios: tuple[float, ...] = (0.75, 0.8)
    """Mask ratios, one block of rows each."""
    num_images: int = 12
    """Images drawn, spread evenly over the split."""
    seed: int = 0
    """Seed of the masks."""
    out: str = "reconstructions.png"
    """File that is written, here or at s3://."""

    def __post_init__(self) -> None:
        if not self.ratios or self.num_images < 1:
            raise UserError("ratios and num_images must name at least one; try --ratios 0.75 0.8 --num-images 12")
        if not self.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise UserError(f"out {self.out!r} is no picture's name; try reconstructions.png")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """A look at a prepared dataset, or at a source before it is prepared."""

    num_images: int = 32
    """Samples drawn, and at most as many of the quarantine."""
    seed: int = 0
    """Seed of the choice from a source."""
    out: str = "contact-sheet.png"
    """File that the sheet is written to, here or at s3://."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= 1000:
            raise UserError(f"num_images {self.num_images} is outside [1, 1000]; try 32")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """A checkpoint of a pretraining run becomes a version of a registered model."""

    name: str = ""
    """Registered model; empty for the run's own, mae-<arch>."""
    experiment: str = ""
    """MLflow experiment that holds the run; empty for the run's own."""

    def __post_init__(self) -> None:
        check_model_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Runs with their state, step, last checkpoint and loss."""

    watch: bool = False
    """Follow one run, a line for each step that leaves metrics, until it has ended."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on the embedded sample, in minutes."""

    output: str = "mae-demo"
    """Folder for everything that the demo writes."""
    seeds: int = 3
    """Fine-tunings and trainings from scratch that are averaged."""
    quick: bool = False
    """Every part with a fraction of the training: checks an installation; its accuracies mean nothing."""
