import pytest
import torch

from mae_core.attention import attention_weights, encode_with_attention
from mae_core.config import parse_arch
from mae_core.encoder import build_encoder, encode

ARCH = parse_arch("vit_pico_patch4")


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return build_encoder(ARCH, (16, 24), 3).eval()


def test_weighted_values_are_what_timms_fused_attention_computes(vit):
    attention, tokens = vit.blocks[0].attn, torch.randn(2, 25, ARCH.width)
    values = attention.qkv(tokens).reshape(2, 25, 3, ARCH.heads, -1)[:, :, 2].transpose(1, 2)
    pooled = (attention_weights(attention, tokens) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(pooled), attention(tokens), rtol=1e-4, atol=1e-5)


def test_tokens_are_those_of_encode_and_attention_has_one_map_per_head(vit):
    images = torch.randn(2, 3, 16, 24)
    tokens, attention = encode_with_attention(vit, images)
    assert torch.equal(tokens, encode(vit, images, None))
    assert attention.shape == (2, ARCH.heads, 24)
    assert (attention > 0).all()
    assert (attention.sum(-1) < 1).all()


def test_nothing_stays_hooked_to_the_model(vit):
    encode_with_attention(vit, torch.randn(1, 3, 16, 24))
    assert not vit.blocks[-1].attn._forward_pre_hooks
