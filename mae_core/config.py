"""Options of the method as frozen dataclasses, validated once. Imports no torch, so that `mae --help` is quick."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mae_core.errors import UserError

Size = tuple[int, int]

# name: (width, depth, heads). Ti to H are the paper's and timm's; pico and nano are for 28 to 64 px images.
SIZES: dict[str, tuple[int, int, int]] = {
    "pico": (64, 4, 4),
    "nano": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
MAX_CHANNELS = 64
"""Most channels of an image."""
LAYER_NORM_EPS = 1e-6
"""Epsilon of every layer norm in the reference and in timm's ViT; transformers has 1e-12."""
ADDED: Mapping[str, bool] = {"added": True}
"""Metadata of a field that configs of earlier versions lack. While it has its default, it is no part of the identity of
a run, so that runs of earlier versions keep their names and can be resumed."""
_ARCH = re.compile(r"vit_(?P<size>[a-z]+)_patch(?P<patch>[0-9]+)(_cls(?P<class_tokens>[0-9]+))?")


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Dimensions of a ViT; `parse_arch` makes one from a name such as `vit_base_patch16`."""

    name: str
    width: int
    depth: int
    heads: int
    patch_px: int
    class_tokens: int
    """Tokens before those of the patches: one, or several as in Pixio (arXiv 2512.15715)."""


def parse_arch(name: str) -> Arch:
    """Parse an architecture name `vit_<size>_patch<px>`, or with `_cls<n>` for n class tokens, at least 2.

    Raises UserError for any other name.
    """
    found = _ARCH.fullmatch(name)
    is_known = found is not None and found["size"] in SIZES and int(found["patch"]) >= 1
    if found is None or not is_known or (found["class_tokens"] and int(found["class_tokens"]) < 2):
        raise UserError(
            f"unknown architecture {name!r}; try vit_<size>_patch<px> with size one of {', '.join(SIZES)}, "
            "such as vit_base_patch16 or vit_nano_patch4, or vit_base_patch16_cls8 for 8 class tokens instead of one"
        )
    width, depth, heads = SIZES[found["size"]]
    class_tokens = int(found["class_tokens"] or 1)
    return Arch(
        name=name, width=width, depth=depth, heads=heads, patch_px=int(found["patch"]), class_tokens=class_tokens
    )


def patch_grid(image_px: Size, patch_px: int) -> Size:
    """Count rows and columns of patches. Raises UserError if the patch does not divide a side."""
    for side_px in image_px:
        if side_px < patch_px or side_px % patch_px:
            nearest_px = max(patch_px, round(side_px / patch_px) * patch_px)
            raise UserError(f"image side {side_px}px is not a multiple of patch {patch_px}px; try {nearest_px}px")
    return image_px[0] // patch_px, image_px[1] // patch_px


def num_visible(num_patches: int, ratio: float) -> int:
    """Count visible patches: int(num * (1 - ratio)), truncated in float64 as in the reference (0.8 of 100: 19)."""
    return int(num_patches * (1 - ratio))


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are hidden (section 3, Figure 6)."""

    kind: Literal["random", "block", "grid"] = "random"
    """random: uniformly; block: rectangles, as in BEiT; grid: one patch in every k x k cell stays visible."""
    ratio: float = 0.75
    """Share of patches that are hidden, above 0 and below 1. A grid needs 1 - 1/k^2: 0.75 for cells of 2 x 2."""
    cell: int = field(default=1, metadata=ADDED)
    """Side in patches of the aligned squares that a random mask hides or shows as a whole; 1 in MAE. Larger ones make
    hidden patches harder to copy from neighbours (Pixio, arXiv 2512.15715)."""

    def __post_init__(self) -> None:
        if self.cell < 1 or (self.cell > 1 and self.kind != "random"):
            raise UserError(f"mask cell {self.cell} of kind {self.kind} must be 1, or more with kind random; try 1")
        if not 0 < self.ratio < 1:
            raise UserError(f"mask ratio {self.ratio} is outside (0, 1); try 0.75")
        if self.kind == "grid":
            self.grid_cell()

    def num_visible(self, num_patches: int) -> int:
        """Count the visible patches of a random or block mask: whole cells, truncated as `num_visible` does."""
        return num_visible(num_patches // self.cell**2, self.ratio) * self.cell**2

    def grid_cell(self) -> int:
        """Compute the side of a grid mask's cell in patches. Raises UserError if no grid has this ratio."""
        cell = round((1 / (1 - self.ratio)) ** 0.5)
        if cell < 2 or abs(1 - 1 / cell**2 - self.ratio) > 1e-3:
            raise UserError(f"mask ratio {self.ratio} makes no grid; try 0.75 (2 x 2 cells) or 0.8889 (3 x 3 cells)")
        return cell


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A masked autoencoder: timm's ViT as encoder, a light decoder, masking and prediction target."""

    arch: str = "vit_base_patch16"
    """Encoder, vit_<size>_patch<px>; sizes: pico, nano, tiny, small, base, large, huge. vit_base_patch16_cls8 has eight
    class tokens instead of one (Pixio); their mean is the class token of probes and embeddings."""
    image_px: Size = (224, 224)
    """Height and width of the input, each a multiple of the patch size."""
    channels: int = 3
    """Channels of the input, 1 to 64; 1 for grayscale."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Masking during pretraining."""
    decoder_depth: int = 8
    """Transformer blocks of the decoder (Table 1a)."""
    decoder_width: int = 512
    """Width of the decoder's tokens (Table 1b)."""
    decoder_heads: int = 16
    """Attention heads of the decoder; must divide its width."""
    mask_token_in: Literal["decoder", "encoder"] = "decoder"
    """Where mask tokens enter; in the encoder they cost 3x the time and lose accuracy (Table 1c)."""
    target: Literal["norm_pixels", "pixels", "pca"] = "norm_pixels"
    """What is predicted: pixels, pixels normalized within each patch, or the leading principal components of patches
    (Table 1d)."""
    pca_components: int = field(default=96, metadata=ADDED)
    """Principal components of target pca, at most the values of a patch. They are fitted on up to 2,048 training images
    when pretraining starts, and kept with the weights."""
    decoder_attention: Literal["self", "cross"] = "self"
    """self: all tokens attend to each other (the paper); cross: mask tokens attend to visible ones only (CrossMAE)."""
    encoder_layers: int = field(default=1, metadata=ADDED)
    """Encoder blocks, evenly spaced up to the last, whose tokens each decoder block attends to in a learned mixture of
    its own (CrossMAE's weighted features); 1 for those of the last block. More need decoder_attention cross."""
    predicted_share: float = 1.0
    """Share of the hidden patches that a training step predicts, drawn anew each time; pictures show all."""
    norm_eps: float = field(default=LAYER_NORM_EPS, metadata=ADDED)
    """Epsilon of the layer norms; weights trained with transformers need 1e-12."""

    def __post_init__(self) -> None:
        grid = self.grid
        num_patches = grid[0] * grid[1]
        side = self.mask.cell
        if grid[0] % side or grid[1] % side:
            fitting = [n for n in range(1, side) if grid[0] % n == 0 and grid[1] % n == 0]
            raise UserError(
                f"a mask cell of {side} x {side} patches does not divide {grid[0]} x {grid[1]} patches; "
                f"try --model.mask.cell {max(fitting)}"
            )
        if self.mask.kind != "grid" and self.num_visible < 1:
            raise UserError(
                f"mask ratio {self.mask.ratio} leaves none of {num_patches} patches visible; "
                f"try {int(100 * (1 - 1 / num_patches)) / 100 if num_patches > 1 else 'a smaller patch'}"
            )
        if self.num_visible == num_patches:
            raise UserError(f"mask ratio {self.mask.ratio} hides none of {num_patches} patches; try 0.75")
        if self.mask.kind == "grid":
            cell = self.mask.grid_cell()
            if grid[0] % cell or grid[1] % cell:
                sides = [max(cell, round(side / cell) * cell) * parse_arch(self.arch).patch_px for side in grid]
                raise UserError(
                    f"a grid mask of ratio {self.mask.ratio} needs sides of a multiple of {cell} patches, not "
                    f"{grid[0]} x {grid[1]}; try image_px {sides[0]} {sides[1]}"
                )
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise UserError(f"channels {self.channels} is outside 1 to {MAX_CHANNELS}; try 3, or 1 for grayscale")
        if self.decoder_depth < 1:
            raise UserError(f"decoder depth {self.decoder_depth} is below 1; try 8, or 1 for the fastest")
        if self.decoder_heads < 1:
            raise UserError(f"decoder heads {self.decoder_heads} are below 1; try 16")
        if self.decoder_width < 4 or self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise UserError(
                f"decoder width {self.decoder_width} must be a multiple of 4 and of its {self.decoder_heads} heads; "
                f"try {max(4, self.decoder_heads) * 32}"
            )
        if self.decoder_attention == "cross" and self.mask_token_in == "encoder":
            raise UserError(
                "decoder_attention cross needs mask tokens in the decoder, but mask_token_in is encoder; "
                "try mask_token_in decoder"
            )
        depth = parse_arch(self.arch).depth
        if not 1 <= self.encoder_layers <= depth:
            raise UserError(
                f"encoder_layers {self.encoder_layers} is outside 1 to the {depth} blocks of {self.arch}; "
                f"try {min(6, depth)}"
            )
        if self.encoder_layers > 1 and self.decoder_attention == "self":
            raise UserError(
                f"encoder_layers {self.encoder_layers} needs decoder_attention cross, whose blocks read the encoder's "
                "tokens each by itself; try --model.decoder-attention cross"
            )
        if self.target == "pca" and not 1 <= self.pca_components <= self.patch_dim:
            raise UserError(
                f"pca_components {self.pca_components} is outside 1 to the {self.patch_dim} values of a patch; "
                f"try {max(1, self.patch_dim // 8)}"
            )
        if not 0 < self.predicted_share <= 1:
            raise UserError(f"predicted_share {self.predicted_share} is outside (0, 1]; try 0.3333, or 1 for all")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps {self.norm_eps} is outside (0, 1); try 1e-6")

    @property
    def patch_px(self) -> int:
        return parse_arch(self.arch).patch_px

    @property
    def mixed_blocks(self) -> tuple[int, ...]:
        """Numbers, from 0, of the encoder's blocks whose tokens the decoder reads: evenly spaced, the last one last."""
        depth, num = parse_arch(self.arch).depth, self.encoder_layers
        return tuple(depth * (i + 1) // num - 1 for i in range(num))

    @property
    def class_tokens(self) -> int:
        return parse_arch(self.arch).class_tokens

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.patch_px**2 * self.channels

    @property
    def target_dim(self) -> int:
        """Values that are predicted of a patch."""
        return self.pca_components if self.target == "pca" else self.patch_dim

    @property
    def grid(self) -> Size:
        """Rows and columns of patches."""
        return patch_grid(self.image_px, self.patch_px)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_visible(self) -> int:
        """Patches that stay visible under the mask."""
        if self.mask.kind == "grid":
            return self.num_patches // self.mask.grid_cell() ** 2
        return self.mask.num_visible(self.num_patches)

    @property
    def num_predicted(self) -> int:
        """Hidden patches that a training step predicts: the rounded share, at least one."""
        return max(1, round(self.predicted_share * (self.num_patches - self.num_visible)))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule (Tables 8 to 10)."""

    name: Literal["adamw", "lars", "muon"] = "adamw"
    """adamw for transformers, lars for linear probes; muon: orthogonalized momentum for the matrices of all blocks, at
    AdamW's rates, and AdamW for everything else."""
    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256; the rate used is base_lr x batch / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "constant"] = field(default="cosine", metadata=ADDED)
    """Learning rate after the warm-up. cosine: from the peak to min_lr in half a cosine, which is a warm restart if the
    run extends another; constant: the peak, then a decay to min_lr in the last decay_share of the epochs."""
    decay_share: float = field(default=0.2, metadata=ADDED)
    """Share of the epochs, at the end, in which a constant schedule decays to min_lr; 0 for no decay, so that the run
    can be extended at its rate."""
    warmup_epochs: float = 40.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms, tokens and other 1-D parameters are never decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    momentum: float = 0.9
    """Momentum of LARS and Muon."""
    layer_decay: float = 1.0
    """Ratio of a block's learning rate to that of the block above it; 1 treats all alike."""
    clip_norm: float | None = None
    """Limit on the norm of the gradient, which is scaled down to it; without a value there is none."""

    def __post_init__(self) -> None:
        if not 0 < self.base_lr < math.inf:
            raise UserError(f"base_lr {self.base_lr} is not positive; try 1.5e-4")
        for name in ("warmup_epochs", "weight_decay", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} is not a number from 0 up; try 0")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"decay_share {self.decay_share} is outside [0, 1]; try 0.2, or 0 for no decay")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise UserError(f"betas {self.betas} and momentum {self.momentum} are not within [0, 1); try 0.9 0.95")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm {self.clip_norm} is not positive; try 1.0, or leave it out")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay {self.layer_decay} is outside (0, 1]; try 0.75, or 1 for none")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images."""

    crop: Literal["random_resized", "none"] = "random_resized"
    """random_resized: a random box, resized; none: the image resized as for evaluation (Table 1e)."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random box, as a share of the image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width-to-height ratio of the random box."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rand_augment: str = ""
    """timm's RandAugment recipe, such as rand-m9-mstd0.5-inc1; empty for none."""
    erase: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 for none."""
    label_smoothing: float = 0.0
    """Probability mass taken from the true class and spread over all."""
    flip_vertical: bool = field(default=False, metadata=ADDED)
    """Mirror half of the images top to bottom, for images without an up, such as slides and scenes."""
    quarter_turns: bool = field(default=False, metadata=ADDED)
    """Turn images by 0, 90, 180 or 270 degrees at random; the input must be square."""
    drop_bands: float = field(default=0.0, metadata=ADDED)
    """Probability that a channel is set to its mean in training, one channel at least being kept; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale {self.scale} is not within 0 < min <= max <= 1; try 0.2 1.0")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"crop aspect {self.aspect} is not 0 < min <= max; try 0.75 1.3333")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} is not a number from 0 up; try 0.8, or 0 for none")
        if self.rand_augment and not re.fullmatch(r"rand(-[a-z]+[\d.]+)+", self.rand_augment):
            raise UserError(f"rand_augment {self.rand_augment!r} is no recipe of timm's; try rand-m9-mstd0.5-inc1")
        for name in ("erase", "label_smoothing", "drop_bands"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is outside [0, 1); try 0.1, or 0 for none")

    @property
    def is_random(self) -> bool:
        """Whether an image can look different in two epochs."""
        turns = self.flip or self.flip_vertical or self.quarter_turns
        return self.crop != "none" or turns or bool(self.rand_augment) or self.erase > 0 or self.drop_bands > 0


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A ViT classifier on top of an encoder."""

    method: Literal["finetune", "probe", "attentive", "knn"] = "finetune"
    """finetune: train everything; probe: train a linear layer on frozen features, after a BatchNorm without affine;
    attentive: train a query that pools frozen patch tokens by cross-attention, and a linear layer; knn: train nothing,
    classify by the nearest training images (which says little of MAE)."""
    pool: Literal["avg", "token"] = "avg"
    """Input of the head: the mean of the patch tokens, or the class token."""
    drop_path: float = 0.0
    """Stochastic depth, rising linearly to this in the last block."""
    dropout: float = field(default=0.0, metadata=ADDED)
    """Dropout after position embeddings, attention and each layer of an MLP; MAE's recipes use none."""
    head_std: float = 2e-5
    """Standard deviation of the head's initial weights."""
    train_blocks: int | float | None = None
    """Number of last blocks to train along with the head (partial fine-tuning, Figure 9); a half is a block's MLP
    without its attention; without a value all."""
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the weights with this decay; without a value the weights."""
    num_neighbours: int = field(default=20, metadata=ADDED)
    """Nearest training images that vote, for method knn."""
    temperature: float = field(default=0.07, metadata=ADDED)
    """A neighbour of cosine similarity s votes with weight exp(s / temperature), for method knn."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is outside [0, 1); try 0.1, or 0 for none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay {self.ema_decay} is outside (0, 1); try 0.9999")
        if self.train_blocks is not None and (self.train_blocks < 0 or self.train_blocks % 0.5):
            raise UserError(
                f"train_blocks {self.train_blocks:g} is not a multiple of 0.5 from 0 up; try 4, 0.5 for the MLP of the "
                "last block, or 0 for the head alone"
            )
        if self.num_neighbours < 1:
            raise UserError(f"num_neighbours {self.num_neighbours} is below 1; try 20")
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature:g} is not positive; try 0.07")

    @property
    def command(self) -> Literal["finetune", "probe"]:
        """The `mae` command that runs this method: a probe leaves the encoder as it is."""
        return "finetune" if self.method == "finetune" else "probe"
