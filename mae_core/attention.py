"""What the class token of an encoder attends to."""

from typing import Any

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_core.encoder import encode


def encode_with_attention(
    vit: VisionTransformer, images: Float[Tensor, "batch channels height width"]
) -> tuple[Float[Tensor, "batch tokens features"], Float[Tensor, "batch heads patches"]]:
    """Encode complete images; return all tokens, and the class token's attention to the patches in the last block.

    Of several class tokens it is that of the first. A head's attention to all tokens sums to 1; that to class tokens is
    left out.
    """
    inputs: list[Tensor] = []
    attention: Any = vit.blocks[-1].attn
    handle = attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    try:
        tokens = encode(vit, images, None)
    finally:
        handle.remove()
    return tokens, attention_weights(attention, inputs[0])[:, :, 0, vit.num_prefix_tokens :]


def attention_weights(
    attention: Any, tokens: Float[Tensor, "batch tokens features"]
) -> Float[Tensor, "batch heads tokens tokens"]:
    """Compute the weights of timm's attention, which its fused kernel never materializes."""
    batch, num_tokens, _ = tokens.shape
    parts = attention.qkv(tokens).reshape(batch, num_tokens, 3, attention.num_heads, -1)
    query, key, _ = parts.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return (query * attention.scale @ key.transpose(-2, -1)).softmax(-1)
