"""Convert a checkpoint of another project to a model of ours: names, dtype, position tables, and the config they need.

Steps: recognise; drop what is never used; rename; add zero biases to attention without; make everything float32; add
the class token's row to position tables that lack it; read sizes off the shapes; fill in from hints what shapes cannot
say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mae_core.config import LAYER_NORM_EPS, MaskConfig, ModelConfig, Size, patch_grid
from mae_core.errors import UserError
from mae_core.formats import fair, timm, transformers
from mae_core.formats.hints import Hints
from mae_core.formats.layout import Layout, read_layout
from mae_core.formats.ours import Kind, with_qkv_biases
from mae_core.formats.reading import Checkpoint
from mae_core.formats.recognise import recognise, without_unused

_RENAME = {"fair": fair.to_ours, "timm": timm.to_ours, "transformers": transformers.to_ours}
_OFFICIAL_DECODER = (512, 16)
"""Width and heads of the decoder of every MAE that the reference published."""
_DEFAULT_MASK_RATIO = 0.75


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model of ours, converted."""

    what: str
    """What it was."""
    kind: Kind
    model: ModelConfig
    """Its decoder's fields mean nothing unless kind is mae."""
    pool: Literal["token", "avg"]
    classes: tuple[str, ...]
    """Of a classifier; empty otherwise."""
    tensors: dict[str, Tensor]
    """Float32, under our names."""
    notes: tuple[str, ...]
    """What was assumed or left out."""

    @property
    def summary(self) -> str:
        """Describe the model in one line."""
        model = self.model
        size = f"{model.arch} at {model.image_px[0]} x {model.image_px[1]} px, {model.channels} channels"
        if self.kind == "mae":
            return f"{size}, decoder {model.decoder_depth} x {model.decoder_width}"
        if self.kind == "classifier":
            return f"{size}, {len(self.classes)} classes on the {'mean' if self.pool == 'avg' else 'class token'}"
        return f"{size}, no decoder"


def convert(checkpoint: Checkpoint, hints: Hints, what: str) -> Weights:
    """Convert the tensors of file `what`.

    Raises UserError for another kind of model, an incomplete one, a size that SIZES lacks, or if neither tensors nor
    hints say what is needed.
    """
    found = recognise(checkpoint.tensors, what)
    if found.naming == "transformers" and hints.norm_eps is None:
        raise UserError(
            f"{what} is {found.what}, whose heads and layer_norm_eps only its config.json says; give the folder that "
            "holds both"
        )
    kept, dropped = without_unused(checkpoint.tensors, found)
    notes = [f"left out {words}" for words in dropped]
    if checkpoint.stripped:
        notes.append(f"stripped the prefix {checkpoint.stripped!r} from all names")
    tensors = _float32(_RENAME[found.naming](kept))
    full = with_qkv_biases(tensors)
    if len(full) > len(tensors):
        notes.append("set the biases of attention, which has none, to 0")
    full = _with_class_positions(full, hints, notes)
    layout = read_layout(full)
    if hints.pool not in (None, layout.pool):
        raise UserError(
            f"{what} pools by {hints.pool} but its final norm is {'fc_norm' if layout.pool == 'avg' else 'norm'}; "
            "only the mean followed by fc_norm, and norm followed by the class token, are supported"
        )
    return Weights(
        what=found.what,
        kind=found.kind,
        model=_model_config(layout, found.kind, hints, notes),
        pool=layout.pool,
        classes=_classes(layout, hints) if found.kind == "classifier" else (),
        tensors=full,
        notes=tuple(notes),
    )


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to float32, which is exact for half precision. Raises UserError for integers or non-finite values."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(
                f"{name} is {tensor.dtype}: quantized weights are not read; give float32, float16 or bfloat16"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name} holds NaN or infinity; the training that wrote it diverged: give another checkpoint"
            )
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def _with_class_positions(tensors: dict[str, Tensor], hints: Hints, notes: list[str]) -> dict[str, Tensor]:
    """Add a row of zeros for the class token to position tables that have rows for patches only."""
    full, projection = dict(tensors), tensors.get("patch_embed.proj.weight")
    for name, table in tensors.items():
        if name.rpartition(".")[2] != "pos_embed" or table.ndim != 3:
            continue
        rows = table.shape[1]
        lacks_class = _is_square(rows) and not _is_square(rows - 1)
        if hints.image_px and projection is not None:
            lacks_class = rows == math.prod(hints.image_px) // projection[0, 0].numel()
        if lacks_class:
            full[name] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
            notes.append(f"gave the class token the position 0, since {name} has rows for patches only")
    return full


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _model_config(layout: Layout, kind: Kind, hints: Hints, notes: list[str]) -> ModelConfig:
    config = ModelConfig(
        arch=layout.arch(hints.heads),
        image_px=_image_px(layout, hints),
        channels=layout.channels,
        norm_eps=hints.norm_eps or LAYER_NORM_EPS,
        mask=MaskConfig(ratio=hints.mask_ratio or _DEFAULT_MASK_RATIO),
    )
    if kind != "mae":
        return config
    if hints.target is None:
        notes.append("took the prediction for normalized pixels, which the file does not say; else use --target pixels")
    return ModelConfig(
        arch=config.arch,
        image_px=config.image_px,
        channels=config.channels,
        norm_eps=config.norm_eps,
        mask=config.mask,
        decoder_width=layout.decoder_width,
        decoder_depth=layout.decoder_depth,
        decoder_heads=_decoder_heads(layout, hints),
        target=hints.target or "norm_pixels",
    )


def _image_px(layout: Layout, hints: Hints) -> Size:
    """Find the image size from the position table, which is square unless hints say otherwise."""
    num_patches = layout.num_positions - 1
    if hints.image_px:
        rows, columns = patch_grid(hints.image_px, layout.patch_px)
        if rows * columns != num_patches:
            raise UserError(
                f"images of {hints.image_px[0]} x {hints.image_px[1]} px have {rows * columns} patches of "
                f"{layout.patch_px} px, but the position table is for {num_patches}; give the size that the weights "
                "were trained at: fine-tuning and probing resize the table to theirs"
            )
        return hints.image_px
    if not _is_square(num_patches):
        raise UserError(
            f"the position table is for {num_patches} patches, which is no square; give --image-px HEIGHT WIDTH of the "
            "images that the weights were trained at"
        )
    side_px = math.isqrt(num_patches) * layout.patch_px
    return side_px, side_px


def _decoder_heads(layout: Layout, hints: Hints) -> int:
    width, heads = _OFFICIAL_DECODER
    if hints.decoder_heads:
        return hints.decoder_heads
    if layout.decoder_width == width:
        return heads
    raise UserError(
        f"tensors do not say how many heads a decoder of width {layout.decoder_width} has (the official ones of width "
        f"{width} have {heads}); give --decoder-heads"
    )


def _classes(layout: Layout, hints: Hints) -> tuple[str, ...]:
    """Return the class names, or class numbers if nobody named them."""
    names = hints.classes or tuple(map(str, range(layout.num_classes)))
    if len(names) != layout.num_classes:
        raise UserError(
            f"{len(names)} class names are given, but the head has {layout.num_classes} classes; give one for each"
        )
    return names
