"""The paper computed as it is written, over all patches and all tokens: what the fast path must equal."""

import torch
from jaxtyping import Float
from torch import Tensor

from mae_core.loss import normalize
from mae_core.masking import Mask
from mae_core.model import MAE
from mae_core.patches import gather, patchify


def plain_loss(mae: MAE, images: Float[Tensor, "batch channels height width"], mask: Mask) -> Float[Tensor, "batch"]:
    """`mae(images, mask)` with the same modules: embed all patches, drop, encode, unshuffle, decode and predict all."""
    target = patchify(images, mae.config.patch_px)
    if mae.config.target == "norm_pixels":
        target = normalize(target)
    error = (plain_predict(mae, images, mask) - target).square().mean(dim=-1)
    hidden = mask.is_hidden().to(error.dtype)
    return (error * hidden).sum(dim=1) / hidden.sum(dim=1)


def plain_predict(
    mae: MAE, images: Float[Tensor, "batch channels height width"], mask: Mask
) -> Float[Tensor, "batch num dim"]:
    """Every patch's predicted values, visible ones too, in the order of the image."""
    vit, decoder = mae.encoder, mae.decoder
    assert vit.pos_embed is not None
    assert vit.cls_token is not None
    embedded = vit.patch_embed(images)
    if mae.mask_token is not None:
        embedded = torch.where(mask.is_hidden()[..., None], mae.mask_token, embedded)
    embedded = embedded + vit.pos_embed[:, 1:]
    if mae.mask_token is None:
        embedded = gather(embedded, mask.visible_ids)
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    latent = decoder.embed(vit.norm(vit.blocks(torch.cat([class_token, embedded], dim=1))))
    tokens = latent[:, 1:]
    if decoder.mask_token is not None:
        mask_tokens = decoder.mask_token.expand(len(images), mask.hidden_ids.shape[1], -1)
        order = torch.cat([mask.visible_ids, mask.hidden_ids], dim=1).argsort(dim=1)
        tokens = gather(torch.cat([tokens, mask_tokens], dim=1), order)
    tokens = torch.cat([latent[:, :1], tokens], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        tokens = block(tokens)
    return decoder.pred(decoder.norm(tokens))[:, 1:]
