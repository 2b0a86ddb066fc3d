"""An encoder with several class tokens computes what the plain computation does; what follows tells tokens apart."""

import dataclasses
from typing import Any, Literal

import pytest
import timm
import torch

from mae_core.attention import encode_with_attention
from mae_core.classifier import build_classifier, features, load_encoder_weights
from mae_core.config import ClassifierConfig, ModelConfig, parse_arch
from mae_core.encoder import encode, export_tensors
from mae_core.errors import UserError
from mae_core.formats.configs import timm_arguments, timm_name
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.plain import plain_loss
from mae_core.transfer import start_from

CONFIG = ModelConfig(
    arch="vit_pico_patch4_cls3",
    image_px=(16, 24),
    decoder_depth=2,
    decoder_width=32,
    decoder_heads=4,
    predicted_share=0.5,
)


def case(config: ModelConfig) -> tuple[MaskedAutoencoder, torch.Tensor]:
    """Return a model none of whose parameters has its initial value, and images, in float64."""
    generator = torch.Generator().manual_seed(1)
    mae = build_mae(config, 0)
    for parameter in mae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return mae.double(), torch.randn(2, 3, *config.image_px, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("arch", ["vit_pico_patch4", "vit_pico_patch4_cls2", "vit_pico_patch4_cls3"])
def test_the_loss_equals_the_plain_computation(arch: str, attention: Literal["self", "cross"]) -> None:
    config = dataclasses.replace(CONFIG, arch=arch, decoder_attention=attention)
    mae, images = case(config)
    mask = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(2))
    torch.testing.assert_close(mae(images, mask), plain_loss(mae, images, mask), rtol=1e-12, atol=0)


def test_mask_tokens_may_enter_an_encoder_with_several_class_tokens() -> None:
    mae, images = case(dataclasses.replace(CONFIG, mask_token_in="encoder"))
    mask = training_masks(mae.config, seed=0, epoch=0, sample_ids=torch.arange(2))
    torch.testing.assert_close(mae(images, mask), plain_loss(mae, images, mask), rtol=1e-12, atol=0)


def test_encoding_everything_is_timms_forward_with_register_tokens() -> None:
    mae, images = case(CONFIG)
    vit: Any = timm.create_model(timm_name(CONFIG), **timm_arguments(CONFIG, num_classes=0, pool="token")).double()
    vit.load_state_dict(export_tensors(mae.encoder))
    torch.testing.assert_close(encode(mae.encoder, images, None), vit.forward_features(images), rtol=1e-9, atol=1e-9)


def test_pooled_features_are_means_of_class_tokens_or_of_patch_tokens() -> None:
    mae, images = case(CONFIG)
    tokens = encode(mae.encoder, images, None)
    assert tokens.shape[1] == 3 + CONFIG.num_patches
    assert torch.equal(features(mae.encoder, images, "token"), tokens[:, :3].mean(1))
    assert torch.equal(features(mae.encoder, images, "avg"), tokens[:, 3:].mean(1))
    _, attention = encode_with_attention(mae.encoder, images)
    assert attention.shape[2] == CONFIG.num_patches


def test_the_class_token_of_one_is_itself() -> None:
    mae, images = case(dataclasses.replace(CONFIG, arch="vit_pico_patch4"))
    assert torch.equal(features(mae.encoder, images, "token"), encode(mae.encoder, images, None)[:, 0])


def test_weights_go_on_to_a_classifier_of_another_size_with_every_class_token() -> None:
    mae, _ = case(CONFIG)
    arch, larger_px = parse_arch(CONFIG.arch), (32, 24)
    vit = build_classifier(arch, larger_px, 3, 5, ClassifierConfig()).double()
    load_encoder_weights(vit, export_tensors(mae.encoder), CONFIG.image_px)
    assert vit.reg_token is not None
    assert mae.encoder.reg_token is not None
    assert torch.equal(vit.reg_token, mae.encoder.reg_token)
    assert vit.pos_embed is not None
    assert mae.encoder.pos_embed is not None
    assert torch.equal(vit.pos_embed[:, :3], mae.encoder.pos_embed[:, :3])
    assert vit(torch.randn(2, 3, *larger_px, dtype=torch.float64)).shape == (2, 5)


def test_other_numbers_of_class_tokens_take_all_weights_but_the_tokens_and_positions() -> None:
    one = build_mae(dataclasses.replace(CONFIG, arch="vit_pico_patch4"), 0)
    found = start_from(build_mae(CONFIG, 1), one.state_dict(), one.config)
    assert set(found.initial) == {"encoder.reg_token", "encoder.pos_embed", "decoder.pos_embed"}


def test_what_several_class_tokens_cannot_do_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"try --classifier\.pool avg"):
        build_classifier(parse_arch(CONFIG.arch), (16, 24), 3, 5, ClassifierConfig(pool="token"))
    for name in ("vit_pico_patch4_cls1", "vit_pico_patch4_cls", "vit_pico_patch4_reg4"):
        with pytest.raises(UserError, match="vit_base_patch16_cls8"):
            parse_arch(name)


def test_the_name_of_an_architecture_says_how_many_there_are() -> None:
    assert parse_arch("vit_base_patch16_cls8").class_tokens == 8
    assert parse_arch("vit_base_patch16").class_tokens == 1
