import pytest
import timm
import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mae_core.config import ModelConfig, parse_arch
from mae_core.encoder import build_encoder, encode, export_tensors
from mae_core.model import build_mae


@pytest.mark.parametrize(("image_px", "channels"), [((16, 16), 3), ((8, 24), 1)])
def test_encode_without_a_mask_equals_timms_forward_features(image_px, channels):
    vit = build_encoder(parse_arch("vit_pico_patch4"), image_px, channels).eval()
    images = torch.randn(2, channels, *image_px)
    torch.testing.assert_close(encode(vit, images, None), vit.forward_features(images), rtol=1e-5, atol=1e-5)


def test_timms_own_model_takes_the_weights_strictly():
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert isinstance(theirs, VisionTransformer)
    ours = build_encoder(parse_arch("vit_tiny_patch16"), (224, 224), 3)
    theirs.load_state_dict(export_tensors(ours), strict=True)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        theirs.eval().forward_features(images), encode(ours.eval(), images, None), rtol=1e-4, atol=1e-4
    )


def test_positions_are_saved_but_not_trained():
    vit = build_encoder(parse_arch("vit_pico_patch4"), (16, 16), 3)
    assert vit.pos_embed is not None
    assert not vit.pos_embed.requires_grad
    assert "pos_embed" in vit.state_dict()
    assert all(parameter.requires_grad for name, parameter in vit.named_parameters() if name != "pos_embed")


def test_the_encoder_starts_from_xavier_with_the_patch_embedding_as_a_linear_layer():
    vit = build_encoder(parse_arch("vit_small_patch16"), (32, 32), 3)
    first, tokens = vit.blocks[0], vit.cls_token
    assert isinstance(first, Block)
    assert isinstance(first.attn, Attention)
    assert isinstance(first.mlp, Mlp)
    assert isinstance(first.norm1, nn.LayerNorm)
    assert isinstance(vit.norm, nn.LayerNorm)
    assert tokens is not None
    for weight, fans in ((vit.patch_embed.proj.weight, 768 + 384), (first.mlp.fc1.weight, 384 + 1536)):
        bound = (6 / fans) ** 0.5
        assert 0.99 * bound < weight.abs().max().item() <= bound
    assert not first.attn.qkv.bias.any()
    assert first.norm1.eps == vit.norm.eps == 1e-6
    assert 0.015 < tokens.std().item() < 0.025


@pytest.mark.parametrize("size", ["pico", "nano", "tiny", "small", "base"])
def test_encoder_sizes_have_the_papers_shapes(size):
    arch = parse_arch(f"vit_{size}_patch16")
    with torch.device("meta"):
        vit = build_encoder(arch, (32, 32), 3)
    assert len(vit.blocks) == arch.depth
    assert vit.embed_dim == arch.width


def test_a_model_has_one_epsilon_in_all_its_layer_norms():
    config = ModelConfig(arch="vit_pico_patch4", image_px=(16, 16), decoder_width=32, decoder_heads=4, norm_eps=1e-12)
    norms = [module.eps for module in build_mae(config, seed=0).modules() if isinstance(module, torch.nn.LayerNorm)]
    assert set(norms) == {1e-12}
    assert len(norms) == 2 * 4 + 1 + 2 * 8 + 1
