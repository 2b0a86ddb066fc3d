"""Read an architecture off the shapes of tensors under our names, and check that they are complete."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mae_core.config import SIZES
from mae_core.errors import UserError
from mae_core.formats.ours import encoder_part, kind_of, split_block

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the shapes of an encoder, a classifier or an MAE say."""

    width: int
    depth: int
    patch_px: int
    channels: int
    num_positions: int
    """Rows of the position table."""
    pool: Literal["token", "avg"]
    """avg if the final norm is fc_norm, after the mean of the patch tokens."""
    num_classes: int
    """0 without a head."""
    decoder_width: int
    """0 without a decoder."""
    decoder_depth: int

    def arch(self, heads: int | None) -> str:
        """Name the architecture; with `heads`, check them too. Raises UserError if it is none of SIZES."""
        for size, (width, depth, known_heads) in SIZES.items():
            if (width, depth) != (self.width, self.depth):
                continue
            if heads not in (None, known_heads):
                raise UserError(
                    f"an encoder of width {width} and depth {depth} has {known_heads} heads here (vit_{size}), not "
                    f"{heads}; add a size to SIZES in mae_core/config.py"
                )
            return f"vit_{size}_patch{self.patch_px}"
        known = ", ".join(f"{size} {width} x {depth}" for size, (width, depth, _) in SIZES.items())
        raise UserError(
            f"an encoder of width {self.width} and depth {self.depth} is none of the sizes (width x depth) {known}; "
            "add it to SIZES in mae_core/config.py"
        )


def read_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Read the layout of tensors under our names. Raises UserError if one is missing, unknown or of another shape."""
    encoder = encoder_part(tensors)
    projection = _needed(encoder, "patch_embed.proj.weight")
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise UserError(
            f"patch_embed.proj.weight is {tuple(projection.shape)}, but patches are squares of images here: (width, "
            "channels, patch, patch); give an image model with square patches"
        )
    is_mae = kind_of(tensors) == "mae"
    layout = Layout(
        width=projection.shape[0],
        depth=_depth(encoder, "blocks"),
        patch_px=projection.shape[2],
        channels=projection.shape[1],
        num_positions=_needed(encoder, "pos_embed").shape[1],
        pool="avg" if "fc_norm.weight" in encoder else "token",
        num_classes=encoder["head.weight"].shape[0] if "head.weight" in encoder else 0,
        decoder_width=_needed(tensors, "decoder.embed.weight").shape[0] if is_mae else 0,
        decoder_depth=_depth(tensors, "decoder.blocks") if is_mae else 0,
    )
    _check(tensors, dict(_shapes(layout)))
    return layout


def _shapes(layout: Layout) -> Iterator[tuple[str, Shape]]:
    """Yield the name and shape of every tensor of such a model."""
    width, before = layout.width, "encoder." if layout.decoder_width else ""
    yield f"{before}cls_token", (1, 1, width)
    yield f"{before}pos_embed", (1, layout.num_positions, width)
    yield f"{before}patch_embed.proj.weight", (width, layout.channels, layout.patch_px, layout.patch_px)
    yield f"{before}patch_embed.proj.bias", (width,)
    yield from _stack(f"{before}blocks", layout.depth, width)
    yield from _pair(f"{before}{'fc_norm' if layout.pool == 'avg' else 'norm'}", (width,))
    if layout.num_classes:
        yield from _pair("head", (layout.num_classes, width))
    if layout.decoder_width:
        inner = layout.decoder_width
        yield "decoder.mask_token", (1, 1, inner)
        yield "decoder.pos_embed", (1, layout.num_positions, inner)
        yield from _pair("decoder.embed", (inner, width))
        yield from _stack("decoder.blocks", layout.decoder_depth, inner)
        yield from _pair("decoder.norm", (inner,))
        yield from _pair("decoder.pred", (layout.patch_px**2 * layout.channels, inner))


def _stack(name: str, depth: int, width: int) -> Iterator[tuple[str, Shape]]:
    for index in range(depth):
        for part, shape in (
            ("norm1", (width,)),
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("norm2", (width,)),
            ("mlp.fc1", (4 * width, width)),
            ("mlp.fc2", (width, 4 * width)),
        ):
            yield from _pair(f"{name}.{index}.{part}", shape)


def _pair(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"the weights lack {missing[0]!r} ({len(missing)} are missing); fetch or export them again")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"the weights have {unknown[0]!r} ({len(unknown)} are unknown), which no ViT or MAE of this project has; "
            "remove it if the model works without"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{name} is {tuple(tensors[name].shape)} instead of {shape}, as a ViT of width {shape[-1]} has it; "
                "other ratios of the MLP, or other shapes, are not supported"
            )


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = {block[1] for name in tensors if (block := split_block(name)) and block[0] == stack}
    return max(indices, default=-1) + 1


def _needed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the weights lack {name!r}; fetch or export them again")
    return tensors[name]
