"""The decoder: a few light blocks over all tokens, read out where patches are hidden (section 3)."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.config import ModelConfig, parse_arch
from mae_core.encoder import fixed, init_linear, norm_layer
from mae_core.masking import Mask
from mae_core.positions import sincos_2d


class Decoder(nn.Module):
    """Predicts the pixels of hidden patches from the encoder's tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(parse_arch(config.arch).width, width)
        # Where mask tokens entered the encoder already, what it made of them takes this one's place.
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if config.mask_token_in == "decoder" else None
        self.pos_embed = fixed(sincos_2d(width, config.grid, class_token=True)[None])
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(config.decoder_depth)
        )
        self.norm = norm_layer(width)
        self.pred = nn.Linear(width, config.patch_px**2 * config.channels)
        self.apply(init_linear)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Float[Tensor, "batch tokens features"], mask: Mask) -> Float[Tensor, "batch hidden dim"]:
        """The hidden patches' predicted values, in the order of `mask.hidden_ids`.

        Tokens stand in the order class, visible, hidden: attention does not mind, and each brings its position along.
        """
        tokens = self.tokens(latent, mask)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        hidden = last_block(cast(Block, self.blocks[-1]), tokens, first=1 + mask.visible_ids.shape[1])
        return self.pred(self.norm(hidden))

    def tokens(self, latent: Tensor, mask: Mask) -> Tensor:
        """The first block's input [batch, 1 + num_patches, width]."""
        positions = self.pos_embed[0]
        embedded = self.embed(latent)
        shown_ids = mask.visible_ids + 1
        if self.mask_token is None:
            shown_ids = torch.cat([shown_ids, mask.hidden_ids + 1], dim=1)
        tokens = embedded + F.embedding(F.pad(shown_ids, (1, 0)), positions)
        if self.mask_token is None:
            return tokens
        return torch.cat([tokens, self.mask_token + F.embedding(mask.hidden_ids + 1, positions)], dim=1)


def last_block(block: Block, tokens: Tensor, first: int) -> Tensor:
    """`block(tokens)[:, first:]`, computing queries, projection and MLP for those tokens only."""
    attention, mlp = cast(Attention, block.attn), cast(nn.Module, block.mlp)
    width, heads = tokens.shape[2], attention.num_heads
    weight_q, weight_kv = attention.qkv.weight.split([width, 2 * width])
    bias_q, bias_kv = attention.qkv.bias.split([width, 2 * width])
    normed = block.norm1(tokens)
    query = F.linear(normed[:, first:], weight_q, bias_q).unflatten(2, (heads, -1)).transpose(1, 2)
    key_value = F.linear(normed, weight_kv, bias_kv).unflatten(2, (2, heads, -1))
    key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    kept = tokens[:, first:] + attention.proj(mixed)
    return kept + mlp(block.norm2(kept))
