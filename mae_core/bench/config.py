"""Options of the step benchmark."""

from dataclasses import dataclass
from typing import Literal

from mae_core.config import MaskConfig, ModelConfig
from mae_core.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]
MIN_ROUNDS = 6
"""Fewer pairs give no distribution-free 95 % interval of the median."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A training step of named models, timed in turns with other implementations of the same step."""

    model: tuple[str, ...] = ("vit_small_patch8",)
    """Encoders, vit_<size>_patch<px>, measured one after another."""
    image_px: int = 64
    """Height and width of the input."""
    batch: int = 32
    """Masked images per step."""
    precision: Precision = "float32"
    """Autocast type of the forward pass; float16 uses loss scaling."""
    plain_precision: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Autocast type of the plain computation."""
    mask_ratio: float = 0.75
    """Share of patches that are hidden."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_width: int = 512
    """Width of the decoder's tokens."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    decoder_attention: Literal["self", "cross"] = "self"
    """Attention of our decoder; the others have the paper's (self)."""
    predicted_share: float = 1.0
    """Share of the hidden patches that ours predicts; the others predict all."""
    masks_per_image: int = 1
    """Masks per image in ours; the batch counts masked images and must be a multiple."""
    compile: Literal["eager", "default", "reduce-overhead", "max-autotune"] = "eager"
    """torch.compile's mode for ours; reduce-overhead and max-autotune use CUDA graphs."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Kernel of ours for scaled dot-product attention; auto is torch's choice."""
    optimizer: Literal["fused", "foreach", "loop"] = "fused"
    """How AdamW runs, in all that is compared."""
    against: tuple[Literal["plain", "transformers"], ...] = ("plain", "transformers")
    """What ours is compared with: mae_core/plain.py in eager mode, and transformers' ViTMAE where it is installed."""
    images: str = ""
    """Folder of images, read once before timing starts; empty for random pixels."""
    rounds: int = 30
    """Rounds; in each, everything is timed once, in rotating order."""
    steps_per_round: int = 1
    """Steps timed together; more hide the launch latency of a GPU's first kernels."""
    profile: int = 0
    """Number of our most expensive operations to list, profiled after the rounds."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: CPU seconds of this process, for one thread (OMP_NUM_THREADS=1) on a shared machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of weights, images and masks."""

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise UserError(f"rounds {self.rounds} give no 95 % interval; try {MIN_ROUNDS} or more")
        if self.steps_per_round < 1:
            raise UserError(f"steps_per_round {self.steps_per_round} is below 1; try 1")
        if self.batch < 1 or self.masks_per_image < 1 or self.batch % self.masks_per_image:
            raise UserError(
                f"batch {self.batch} is not a multiple of masks_per_image {self.masks_per_image}; "
                f"try {max(1, self.masks_per_image) * max(1, self.batch // max(1, self.masks_per_image))}"
            )
        if self.clock == "cpu" and self.device == "cuda":
            raise UserError("clock cpu does not measure a GPU; try --clock wall")
        if not self.model:
            raise UserError("no model is named; try --model vit_small_patch8")
        for arch in self.model:
            self.of(arch)

    def of(self, arch: str) -> ModelConfig:
        """Build the config of the autoencoder with this encoder. Raises UserError if the sizes do not fit."""
        return ModelConfig(
            arch=arch,
            image_px=(self.image_px, self.image_px),
            mask=MaskConfig(ratio=self.mask_ratio),
            decoder_depth=self.decoder_depth,
            decoder_width=self.decoder_width,
            decoder_heads=self.decoder_heads,
            decoder_attention=self.decoder_attention,
            predicted_share=self.predicted_share,
        )

    @property
    def same_mathematics(self) -> bool:
        """Whether ours computes the paper's loss, so that its value must equal the plain computation's."""
        return self.decoder_attention == "self" and self.predicted_share == 1 and self.masks_per_image == 1
