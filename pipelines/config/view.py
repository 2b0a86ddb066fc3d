"""Options of the commands that show images, models and runs, and of the demo."""

from dataclasses import dataclass, field
from typing import Literal

from mae_core.config import ADDED, Size
from mae_core.errors import UserError
from pipelines.config.data import SourceConfig
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
    """Mask ratios, each with a block of rows: shares such as 0.75, or percentages such as 75."""
    num_images: int = 12
    """Number of images, spread evenly over the split."""
    seed: int = 0
    """Seed of the masks."""
    visible: tuple[int, ...] = field(default=(), metadata=ADDED)
    """Patches that stay visible in every image, counted row by row from 0, instead of masks of `ratios`."""
    paste: bool = field(default=True, metadata=ADDED)
    """Show visible patches as they are; otherwise as they are predicted, like the paper's figures. No loss covers those
    predictions, so they are of worse quality."""
    crisp: bool = field(default=False, metadata=ADDED)
    """For a model of normalized pixels: take mean and contrast of each hidden patch from the original, which the model
    did not predict, instead of estimating them from visible patches nearby."""
    bands: tuple[int, ...] = field(default=(), metadata=ADDED)
    """Channels shown as red, green and blue, or one as gray, counted from 0; without them the first three."""
    out: str = "reconstructions.png"
    """Output file: a path or an s3:// URI."""
    separate: bool = field(default=False, metadata=ADDED)
    """Also write one file per image and mask, masked | reconstruction | original, into a folder named like the file."""
    run: str = field(default="", metadata=ADDED)
    """Folder of a pretraining run: draw the model of each of its checkpoints, as an animation, instead of `model`. To
    keep some, pretrain with --checkpoint.keep-every-epochs."""
    frame_s: float = field(default=0.5, metadata=ADDED)
    """Seconds that a checkpoint is shown in an animation; the last one is shown four times as long."""

    def __post_init__(self) -> None:
        if not self.ratios or self.num_images < 1:
            raise UserError("ratios and num_images must be at least one each; try --ratios 0.75 0.8 --num-images 12")
        if any(not 0 < ratio < 1 for ratio in self.shares):
            raise UserError(f"ratios {self.ratios} are not all within (0, 1) or from 1 to 99 percent; try 75 80")
        if self.run and not self.out.lower().endswith((".gif", ".webp", ".png")):
            raise UserError(f"out {self.out!r} of an animation must end in .gif, .webp or .png (APNG); try run.gif")
        if self.run and self.separate:
            raise UserError("separate is for pictures of one model, and run makes an animation; leave one out")
        if not 0.02 <= self.frame_s <= 60:
            raise UserError(f"frame_s {self.frame_s:g} is outside [0.02, 60]; try 0.5")
        if len(self.bands) not in (0, 1, 3) or any(band < 0 for band in self.bands):
            raise UserError(f"bands {self.bands} are not one or three channels from 0 up; try --bands 3 2 1")
        if not self.run and not self.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise UserError(f"out {self.out!r} must end in .png, .jpg, .jpeg or .webp; try reconstructions.png")

    @property
    def shares(self) -> tuple[float, ...]:
        """Mask ratios as shares: those of 1 and above are percentages."""
        return tuple(ratio / 100 if ratio >= 1 else ratio for ratio in self.ratios)


@dataclass(frozen=True, kw_only=True)
class InspectConfig(SourceConfig):
    """Counts and a contact sheet of a prepared dataset, or of a source before it is prepared."""

    num_images: int = 32
    """Number of samples on the sheet, and the most quarantined images added to them."""
    seed: int = 0
    """Seed of the choice of images from a source."""
    out: str = "contact-sheet.png"
    """Output file of the sheet: a path or an s3:// URI."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
class ImportConfig:
    """Weights from elsewhere as a version of a registered model. Options replace what the files say."""

    name: str = ""
    """Registered model, such as mae-vit_base_patch16-official; required."""
    licence: str = ""
    """Licence of the weights, such as CC-BY-NC-4.0; required unless this project exported them."""
    origin: str = ""
    """URL that the weights come from; required unless this project exported them."""
    mean: tuple[float, ...] = ()
    """Mean of each channel that the model was trained with; if empty, as the files say, else ImageNet's."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel; if empty, as the files say, else ImageNet's."""
    image_px: Size | None = None
    """Height and width the model was trained at; without a value read off the position table, which must be square."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; without a value as the files say, or 16 if its width is 512."""
    target: Literal["norm_pixels", "pixels"] | None = None
    """What the decoder predicts; without a value as the files say, else norm_pixels."""
    classes: str = ""
    """Text file with the class names of a classifier, one a line; if empty, as the files say, else class numbers."""
    experiment: str = "mae"
    """MLflow experiment of the import."""

    def __post_init__(self) -> None:
        check_model_name(self.name)
        if len(self.mean) != len(self.std):
            raise UserError(f"mean {self.mean} and std {self.std} differ in length; give one of each per channel")
        if any(std <= 0 for std in self.std):
            raise UserError(f"std {self.std} is not above 0; give the deviation of each channel on the scale 0 to 1")
        if self.decoder_heads is not None and self.decoder_heads < 1:
            raise UserError(f"decoder_heads {self.decoder_heads} is below 1; try 16")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A model version in the format of another project, with a model card and the line that loads it."""

    format: Literal["timm", "transformers", "fair", "onnx", "torch"] = "timm"
    """timm, transformers: safetensors and config for timm.create_model or from_pretrained; fair: a .pth file with the
    names of the reference implementation; onnx: model.onnx; torch: model.pt2 of torch.export."""
    part: Literal["whole", "encoder", "classifier"] = "whole"
    """whole: a classifier, or a backbone with its decoder if the format has names for one (transformers, fair);
    encoder: a backbone without its decoder; classifier: refuse a model without classes."""
    dynamic_size: bool = False
    """Let a program (onnx, torch) take images of any size of whole patches, to which positions are interpolated."""

    def __post_init__(self) -> None:
        if self.dynamic_size and self.format not in ("onnx", "torch"):
            raise UserError(
                f"dynamic_size is for the formats onnx and torch, not {self.format}; leave it out: timm and "
                "transformers resize positions where the model is loaded"
            )


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
    seeds: int = 2
    """Number of seeds over which fine-tuning and training from scratch are averaged."""
    quick: bool = False
    """Run every part with a fraction of the training, to check an installation; the accuracies mean nothing."""
