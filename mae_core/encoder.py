"""The encoder: timm's VisionTransformer, run on visible patches only (section 3)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.config import LAYER_NORM_EPS, Arch, Size, patch_grid
from mae_core.masking import Mask
from mae_core.patches import gather_patches, patchify
from mae_core.positions import sincos_2d


def build_encoder(
    arch: Arch,
    image_px: Size,
    channels: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    num_classes: int = 0,
    pool: Literal["token", "avg"] = "token",
    norm_eps: float = LAYER_NORM_EPS,
) -> VisionTransformer:
    """Build a ViT with fixed sine-cosine positions, initialized as in the reference from torch's global generator.

    `pool="avg"` normalizes after the mean over patches (timm's fc_norm) instead of before it. Raises UserError if the
    patch does not divide the image.
    """
    grid = patch_grid(image_px, arch.patch_px)
    vit = VisionTransformer(
        img_size=image_px,
        patch_size=arch.patch_px,
        in_chans=channels,
        num_classes=num_classes,
        global_pool=pool,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.heads,
        drop_path_rate=drop_path,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        norm_layer=norm_layer(norm_eps),
        # timm's name for what Pixio calls further class tokens.
        reg_tokens=arch.class_tokens - 1,
        weight_init="skip",
    )
    vit.apply(init_linear)
    patch_weight = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
    nn.init.zeros_(vit.patch_embed.proj.bias)
    assert vit.cls_token is not None
    nn.init.normal_(vit.cls_token, std=0.02)
    if vit.reg_token is not None:
        nn.init.normal_(vit.reg_token, std=0.02)
    vit.pos_embed = fixed(sincos_2d(arch.width, grid, class_tokens=arch.class_tokens)[None])
    return vit


def encode(
    vit: VisionTransformer,
    images: Float[Tensor, "batch channels height width"],
    mask: Mask | None,
    mask_token: Float[Tensor, "1 1 features"] | None = None,
    positions: Float[Tensor, "1 rows features"] | None = None,
) -> Float[Tensor, "batch tokens features"]:
    """Encode the visible patches, or all of them if `mask` is None; the class tokens come first, usually one.

    With a mask token, one per hidden patch follows the visible patches (Table 1c). Tokens are normalized by the ViT's
    last norm. `images` are normalized pixels (`pixels_to_input`). Images of another size than the ViT's need the
    position table of their grid.
    """
    return vit.norm(vit.blocks(_embedded(vit, images, mask, mask_token, positions)))


def encode_blocks(
    vit: VisionTransformer,
    images: Float[Tensor, "batch channels height width"],
    mask: Mask | None,
    blocks: Sequence[int],
    positions: Float[Tensor, "1 rows features"] | None = None,
) -> Float[Tensor, "batch layers tokens features"]:
    """Return what `encode` does of the tokens after each of these blocks, by number from 0, ascending.

    The last norm normalizes all of them.
    """
    tokens, found = _embedded(vit, images, mask, None, positions), []
    for number, block in enumerate(vit.blocks):
        tokens = block(tokens)
        if number in blocks:
            found.append(vit.norm(tokens))
    return torch.stack(found, dim=1)


def encode_layers(
    vit: VisionTransformer, images: Float[Tensor, "batch channels height width"], num_layers: int
) -> list[Float[Tensor, "batch tokens features"]]:
    """Encode all patches; return the tokens after each of the last `num_layers` blocks, normalized by the last norm."""
    tokens, found = _embedded(vit, images, None, None), []
    for number, block in enumerate(vit.blocks):
        tokens = block(tokens)
        if number >= len(vit.blocks) - num_layers:
            found.append(vit.norm(tokens))
    return found


def _embedded(
    vit: VisionTransformer,
    images: Tensor,
    mask: Mask | None,
    mask_token: Tensor | None,
    table: Tensor | None = None,
) -> Tensor:
    """Return what the first block reads: patches with their positions, after the class tokens."""
    if table is None:
        assert images.shape[-2:] == vit.patch_embed.img_size, f"images {images.shape} for {vit.patch_embed.img_size}"
        table = vit.pos_embed
    projection = vit.patch_embed.proj
    patch_px = projection.kernel_size[0]
    patches = patchify(images, patch_px) if mask is None else gather_patches(images, mask.visible_ids, patch_px)
    # Values of a patch are ordered row, column, channel; the convolution's weight is channel, row, column.
    embedded = F.linear(patches, projection.weight.permute(0, 2, 3, 1).flatten(1), projection.bias)
    assert table is not None
    assert vit.cls_token is not None
    positions, first = table[0], vit.num_prefix_tokens
    class_tokens = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
    tokens = [(class_tokens + positions[:first]).expand(len(images), -1, -1)]
    if mask is None:
        tokens.append(embedded + positions[first:])
    else:
        tokens.append(embedded + F.embedding(mask.visible_ids + first, positions))
        if mask_token is not None:
            tokens.append(mask_token + F.embedding(mask.hidden_ids + first, positions))
    return torch.cat(tokens, dim=1)


def export_tensors(vit: VisionTransformer) -> dict[str, Tensor]:
    """Return the encoder's tensors under timm's names, without a head."""
    return {name: tensor.detach() for name, tensor in vit.state_dict().items() if not name.startswith("head.")}


def norm_layer(eps: float) -> Any:
    """Return the class of the layer norms with this epsilon, as timm's constructors take it."""
    return partial(nn.LayerNorm, eps=eps)


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer with Xavier's uniform distribution and zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fixed(values: Tensor) -> nn.Parameter:
    """Wrap values that are saved but not trained; as a parameter and not a buffer, as in timm's ViT."""
    return nn.Parameter(values, requires_grad=False)
