"""Options of the commands that show images, models and runs, and of the demo."""

from dataclasses import dataclass

from mae_core.errors import UserError
from pipelines.config.running import check_model_name


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Pictures like Figures 2 and 3 of the paper: masked | reconstruction | original."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone that reconstructs the images."""
    uri: str = ""
    """Prepared dataset, or a folder of images."""
    split: str = "test"
    """Split of a prepared dataset that images are taken from."""
    ratios: tuple[float, ...] = (0.75, 0.8)
    """Mask ratios; each gets a block of rows."""
    num_images: int = 12
    """Number of images, spread evenly over the split."""
    seed: int = 0
    """Seed of the masks."""
    out: str = "reconstructions.png"
    """Output file: a path or an s3:// URI."""

    def __post_init__(self) -> None:
        if not self.ratios or self.num_images < 1:
            raise UserError("ratios and num_images must be at least one each; try --ratios 0.75 0.8 --num-images 12")
        if not self.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise UserError(f"out {self.out!r} must end in .png, .jpg, .jpeg or .webp; try reconstructions.png")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Counts and a contact sheet of a prepared dataset, or of a source before it is prepared."""

    num_images: int = 32
    """Number of samples on the sheet, and the most quarantined images added to them."""
    seed: int = 0
    """Seed of the choice of images from a source."""
    out: str = "contact-sheet.png"
    """Output file of the sheet: a path or an s3:// URI."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= 1000:
            raise UserError(f"num_images {self.num_images} is outside [1, 1000]; try 32")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Registration of a checkpoint of a pretraining run as a model version."""

    name: str = ""
    """Registered model; if empty, the name in the run's config or mae-<arch>."""
    experiment: str = ""
    """MLflow experiment of the run; if empty, the one in the run's config."""

    def __post_init__(self) -> None:
        check_model_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Listing of runs with their state, step, last checkpoint and loss."""

    watch: bool = False
    """Follow one run until it ends, with a line for each step that has metrics."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """End-to-end run of the pipeline on the bundled sample, in minutes."""

    output: str = "mae-demo"
    """Folder for all files of the demo."""
    seeds: int = 3
    """Number of seeds over which fine-tuning and training from scratch are averaged."""
    quick: bool = False
    """Run every part with a fraction of the training, to check an installation; the accuracies mean nothing."""
