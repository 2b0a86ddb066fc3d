"""The decoder: a few light transformer blocks that predict hidden patches from visible ones (section 3).

Either all tokens attend to each other, as in the paper, or each mask token attends to the visible ones only
(cross-attention, Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders"). Then patches that are not
predicted cost nothing, and each block may attend to its own mixture of tokens from several blocks of the encoder.
"""

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
    """Predicts hidden patches from the encoder's tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, norm = config.decoder_width, norm_layer(config.norm_eps)
        self.class_tokens = config.class_tokens
        self.is_cross = config.decoder_attention == "cross"
        self.embed = nn.Linear(parse_arch(config.arch).width, width)
        # If mask tokens entered the encoder, the decoder uses their encodings and has none of its own.
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if config.mask_token_in == "decoder" else None
        self.pos_embed = fixed(sincos_2d(width, config.grid, class_tokens=config.class_tokens)[None])
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.decoder_depth)
        )
        # A row per block. At first each reads the encoder's last tokens alone, as without a mixture.
        self.mixture = None
        if config.encoder_layers > 1:
            last = torch.zeros(config.decoder_depth, config.encoder_layers)
            last[:, -1] = 1
            self.mixture = nn.Parameter(last)
        self.norm = norm(width)
        self.pred = nn.Linear(width, config.target_dim)
        self.apply(init_linear)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        latent: Float[Tensor, "batch *layers tokens features"],
        mask: Mask,
        positions: Float[Tensor, "1 rows width"] | None = None,
    ) -> Float[Tensor, "batch predicted dim"]:
        """Predict the patches of `mask.predicted_ids`, in that order; dim is that of the target.

        `latent` are the encoder's tokens, of several blocks if the decoder mixes them. `positions` is the table of the
        images' grid, if it is not that of `config`.
        """
        table = self.pos_embed if positions is None else positions
        if self.is_cross:
            tokens = self._cross(latent, mask, mask.predicted_ids, table)
        else:
            first = self.class_tokens + mask.visible_ids.shape[1] + mask.predicted_from
            tokens = self._self(latent, mask, first, table)
        return self.pred(self.norm(tokens))

    def predict_all(
        self, latent: Float[Tensor, "batch *layers tokens features"], mask: Mask
    ) -> Float[Tensor, "batch num dim"]:
        """Predict the visible patches, which no loss covers, and then the hidden ones, in the order of the mask."""
        if self.is_cross:
            ids = torch.cat([mask.visible_ids, mask.hidden_ids], dim=1)
            tokens = self._cross(latent, mask, ids, self.pos_embed)
        else:
            tokens = self._self(latent, mask, self.class_tokens, self.pos_embed)
        return self.pred(self.norm(tokens))

    def _self(self, latent: Tensor, mask: Mask, first: int, table: Tensor) -> Tensor:
        """Run all blocks with self-attention; return the tokens from place `first` on.

        The order of tokens is class, visible, hidden: attention is invariant to it, since each token carries its
        position. The last block computes queries, projection and MLP for the returned tokens only.
        """
        seen_ids = mask.visible_ids
        if self.mask_token is None:
            seen_ids = torch.cat([seen_ids, mask.hidden_ids], dim=1)
        tokens = self.embed(latent) + self._positions(seen_ids, table)
        if self.mask_token is not None:
            tokens = torch.cat([tokens, self._mask_tokens(mask.hidden_ids, table)], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = cast(Block, self.blocks[-1])
        normed = last.norm1(tokens)
        return _attend(last, tokens[:, first:], normed[:, first:], normed)

    def _cross(self, latent: Tensor, mask: Mask, ids: Tensor, table: Tensor) -> Tensor:
        """Run all blocks on mask tokens of these patches only.

        Each attends to the class and visible tokens, which no block changes.
        """
        positions = self._positions(mask.visible_ids, table)
        embedded = self.embed(latent) if self.mixture is None else F.linear(latent, self.embed.weight)
        tokens = self._mask_tokens(ids, table)
        for number, module in enumerate(self.blocks):
            block = cast(Block, module)
            # The projection is linear: a mixture of projected tokens is the projected mixture.
            mixed = embedded if self.mixture is None else self._mixed(embedded, self.mixture[number])
            tokens = _attend(block, tokens, block.norm1(tokens), block.norm1(mixed + positions))
        return tokens

    def _mixed(self, embedded: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum over the encoder's blocks, with the projection's bias."""
        return torch.einsum("bltw,l->btw", embedded, weights) + self.embed.bias

    def _positions(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the positions of the class tokens, then of these patches."""
        first = torch.arange(self.class_tokens, device=ids.device).expand(len(ids), -1)
        return F.embedding(torch.cat([first, ids + self.class_tokens], dim=1), table[0])

    def _mask_tokens(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return mask tokens with the positions of these patches."""
        assert self.mask_token is not None
        return self.mask_token + F.embedding(ids + self.class_tokens, table[0])


def _attend(block: Block, tokens: Tensor, normed: Tensor, context: Tensor) -> Tensor:
    """Run `block` on tokens that attend to `context`.

    `normed` are the tokens and `context` the attended tokens after the block's first norm.
    """
    attention, mlp = cast(Attention, block.attn), cast(nn.Module, block.mlp)
    width, heads = tokens.shape[2], attention.num_heads
    weight_q, weight_kv = attention.qkv.weight.split([width, 2 * width])
    bias_q, bias_kv = attention.qkv.bias.split([width, 2 * width])
    query = F.linear(normed, weight_q, bias_q).unflatten(2, (heads, -1)).transpose(1, 2)
    key_value = F.linear(context, weight_kv, bias_kv).unflatten(2, (2, heads, -1))
    key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    kept = tokens + attention.proj(mixed)
    return kept + mlp(block.norm2(kept))
