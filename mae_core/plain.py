"""Reference implementation: the paper's computation as written, over all patches and tokens.

Tests require the fast path (`model`) to equal it.
"""

from typing import cast

import torch
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.loss import normalize
from mae_core.masking import Mask
from mae_core.model import MaskedAutoencoder
from mae_core.patches import gather, patchify


def plain_loss(
    mae: MaskedAutoencoder, images: Float[Tensor, "batch channels height width"], mask: Mask
) -> Float[Tensor, "batch"]:
    """Compute `mae(images, mask)` with its modules: embed all, drop hidden patches, encode, unshuffle, predict all."""
    target = patchify(images, mae.config.patch_px)
    if mae.config.target == "norm_pixels":
        target = normalize(target)
    if mae.basis is not None:
        target = torch.einsum("bnd,kd->bnk", target - mae.basis.mean, mae.basis.components)
    error = (plain_predict(mae, images, mask) - target).square().mean(dim=-1)
    counted = torch.zeros_like(error).scatter_(1, mask.predicted_ids, 1.0)
    return (error * counted).sum(dim=1) / counted.sum(dim=1)


def plain_predict(
    mae: MaskedAutoencoder, images: Float[Tensor, "batch channels height width"], mask: Mask
) -> Float[Tensor, "batch num dim"]:
    """Predict every patch, visible ones too, in the order of the image."""
    vit, decoder = mae.encoder, mae.decoder
    assert vit.pos_embed is not None
    assert vit.cls_token is not None
    embedded = vit.patch_embed(images)
    if mae.mask_token is not None:
        embedded = torch.where(mask.is_hidden()[..., None], mae.mask_token, embedded)
    num = mae.config.class_tokens
    embedded = embedded + vit.pos_embed[:, num:]
    if mae.mask_token is None:
        embedded = gather(embedded, mask.visible_ids)
    class_tokens = vit.cls_token if vit.reg_token is None else torch.cat([vit.cls_token, vit.reg_token], dim=1)
    before = (class_tokens + vit.pos_embed[:, :num]).expand(len(images), -1, -1)
    read, layers = torch.cat([before, embedded], dim=1), []
    for block in vit.blocks:
        layers.append(read := block(read))
    latents = [vit.norm(layers[number]) for number in mae.config.mixed_blocks]
    if decoder.is_cross:
        return _cross_predict(mae, latents, mask)
    latent = decoder.embed(latents[-1])
    tokens = latent[:, num:]
    if decoder.mask_token is not None:
        mask_tokens = decoder.mask_token.expand(len(images), mask.hidden_ids.shape[1], -1)
        order = torch.cat([mask.visible_ids, mask.hidden_ids], dim=1).argsort(dim=1)
        tokens = gather(torch.cat([tokens, mask_tokens], dim=1), order)
    tokens = torch.cat([latent[:, :num], tokens], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        tokens = block(tokens)
    return decoder.pred(decoder.norm(tokens))[:, num:]


def _cross_predict(mae: MaskedAutoencoder, latents: list[Tensor], mask: Mask) -> Tensor:
    """Decode with a mask token for every patch, visible ones too; hidden keys are masked out of the attention."""
    decoder, num = mae.decoder, mae.config.class_tokens
    assert decoder.mask_token is not None
    positions = decoder.pos_embed.expand(len(latents[0]), -1, -1)
    attended = torch.nn.functional.pad(~mask.is_hidden(), (num, 0), value=True)[:, None, None]
    tokens = decoder.mask_token + positions[:, num:]
    for number, module in enumerate(decoder.blocks):
        weights = torch.ones(1) if decoder.mixture is None else decoder.mixture[number]
        latent = decoder.embed(sum((w * one for w, one in zip(weights, latents)), torch.zeros_like(latents[0])))
        context = _scattered(latent, mask, positions, num)
        block = cast(Block, module)
        attention, mlp = cast(Attention, block.attn), cast(nn.Module, block.mlp)
        tokens = tokens + _cross_attention(attention, block.norm1(tokens), block.norm1(context), attended)
        tokens = tokens + mlp(block.norm2(tokens))
    return decoder.pred(decoder.norm(tokens))


def _scattered(latent: Tensor, mask: Mask, positions: Tensor, num: int) -> Tensor:
    """Return the encoder's tokens at their places in the image, with positions; those of hidden patches are 0."""
    scattered = torch.zeros_like(positions).scatter(1, _slots(mask.visible_ids, latent, num), latent[:, num:])
    return torch.cat([latent[:, :num], scattered[:, num:]], dim=1) + positions


def _slots(ids: Tensor, latent: Tensor, first: int) -> Tensor:
    return (ids + first)[..., None].expand(-1, -1, latent.shape[2])


def _cross_attention(attention: Attention, tokens: Tensor, context: Tensor, attended: Tensor) -> Tensor:
    """Compute softmax attention step by step, with separate weights of queries, keys and values."""
    heads = attention.num_heads
    sides = zip((tokens, context, context), attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3))
    query, key, value = ((x @ w.T + b).unflatten(2, (heads, -1)).transpose(1, 2) for x, w, b in sides)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    weights = scores.masked_fill(~attended, float("-inf")).softmax(dim=3)
    return attention.proj((weights @ value).transpose(1, 2).flatten(2))
