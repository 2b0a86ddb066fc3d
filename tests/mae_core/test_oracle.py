"""Against an independent implementation: transformers' ViTMAE with our weights and our noise."""

import re

import pytest
import torch
from timm.layers import Attention
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_core.config import MaskConfig, ModelConfig
from mae_core.masking import mask_from_noise
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.patches import gather


def oracle_of(mae: MaskedAutoencoder) -> ViTMAEForPreTraining:
    """Build transformers' model with our weights, position tables and mask token (release 5.23 zeroes those two)."""
    config, width, decoder_width = mae.config, mae.encoder.embed_dim, mae.config.decoder_width
    attention = mae.encoder.blocks[0].attn
    assert isinstance(attention, Attention)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=len(mae.encoder.blocks),
            num_attention_heads=attention.num_heads,
            intermediate_size=4 * width,
            image_size=config.image_px[0],
            patch_size=config.patch_px,
            num_channels=config.channels,
            layer_norm_eps=1e-6,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * decoder_width,
            mask_ratio=config.mask.ratio,
            norm_pix_loss=config.target == "norm_pixels",
        )
    )
    theirs.load_state_dict(translated(mae), strict=True)
    return theirs.eval()


# Ours to theirs, applied in order.
NAMES = [
    (r"^encoder\.blocks", "vit.layers"),
    (r"^encoder\.norm", "vit.layernorm"),
    (r"^encoder\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^encoder\.pos_embed", "vit.embeddings.position_embeddings"),
    (r"^encoder\.cls_token", "vit.embeddings.cls_token"),
    (r"^decoder\.blocks", "decoder.decoder_layers"),
    (r"^decoder\.(embed|norm|pred|pos_embed)", r"decoder.decoder_\1"),
    (r"attn\.proj", "attention.o_proj"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
]


def translated(mae: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in mae.state_dict().items():
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if "attn.qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                found[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("target", ["norm_pixels", "pixels"])
@pytest.mark.parametrize(("channels", "ratio", "depth"), [(3, 0.75, 2), (1, 0.6, 1)])
def test_predictions_and_loss_equal_those_of_transformers(target, channels, ratio, depth):
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(24, 24),
        channels=channels,
        mask=MaskConfig(ratio=ratio),
        decoder_depth=depth,
        decoder_width=32,
        decoder_heads=4,
        target=target,
    )
    mae = build_mae(config, 0).eval()
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = oracle_of(mae)
    images, noise = torch.randn(3, channels, 24, 24), torch.rand(3, 36)
    mask = mask_from_noise(noise, config.num_visible)
    with torch.no_grad():
        expected = theirs(pixel_values=images, noise=noise)
        torch.testing.assert_close(mask.is_hidden().float(), expected.mask)
        predicted = mae.predict(images, mask)
        torch.testing.assert_close(predicted, gather(expected.logits, mask.hidden_ids), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mae(images, mask).mean(), expected.loss, rtol=1e-5, atol=0)
