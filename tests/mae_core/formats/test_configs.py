"""Laws of the configs that go out: what is written is read again, and timm builds what it is told to."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mae_core.config import SIZES, ModelConfig, parse_arch
from mae_core.encoder import build_encoder, encode
from mae_core.errors import UserError
from mae_core.formats.configs import (
    EVALUATION_CROP,
    timm_arguments,
    timm_name,
    transformers_config,
    transformers_preprocessor,
)
from mae_core.formats.hints import from_transformers, normalization_of
from mae_core.normalization import Normalization

CONFIG = ModelConfig(arch="vit_pico_patch4", image_px=(28, 28), target="pixels", norm_eps=1e-12)


@pytest.mark.parametrize("patch_px", [8, 14, 16])
@pytest.mark.parametrize("size", SIZES)
def test_timm_builds_every_architecture(size: str, patch_px: int) -> None:
    config = ModelConfig(arch=f"vit_{size}_patch{patch_px}", image_px=(112, 224), channels=4)
    with torch.device("meta"):
        model: Any = timm.create_model(timm_name(config), **timm_arguments(config, num_classes=0, pool="token"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    arch = parse_arch(config.arch)
    assert len(model.blocks) == arch.depth
    assert model.blocks[0].attn.num_heads == arch.heads
    assert model.blocks[0].norm1.eps == config.norm_eps
    assert shapes["patch_embed.proj.weight"] == (arch.width, 4, patch_px, patch_px)
    assert shapes["pos_embed"] == (1, 1 + config.num_patches, arch.width)


def test_timms_own_sizes_need_no_argument_but_the_classes() -> None:
    for arch in ("vit_tiny_patch16", "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"):
        config = ModelConfig(arch=arch)
        assert timm_name(config) == f"{arch}_224"
        assert timm_arguments(config, num_classes=7, pool="token") == {"num_classes": 7}


def test_transformers_config_is_read_again() -> None:
    hints = from_transformers(transformers_config(CONFIG, "ViTMAEForPreTraining"))
    assert (hints.image_px, hints.heads, hints.decoder_heads) == ((28, 28), 4, 16)
    assert (hints.norm_eps, hints.target, hints.mask_ratio) == (1e-12, "pixels", 0.75)
    assert from_transformers(transformers_config(CONFIG, "ViTForImageClassification", ("a", "b"))).classes == ("a", "b")
    wide = dataclasses.replace(CONFIG, image_px=(28, 56))
    assert from_transformers(transformers_config(wide, "ViTModel")).image_px == (28, 56)
    with pytest.raises(UserError, match=r"square images, but this model 28 x 56 px; export its encoder"):
        transformers_config(wide, "ViTMAEForPreTraining")


def test_the_preprocessor_is_read_again_and_crops_as_evaluation() -> None:
    pixels = Normalization(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    preprocessor = transformers_preprocessor(ModelConfig(), pixels)
    assert normalization_of(preprocessor) == pixels
    assert preprocessor["size"] == {"shortest_edge": 256}
    assert preprocessor["crop_size"] == {"height": 224, "width": 224}


def test_the_crop_is_that_of_evaluation() -> None:
    from pipelines.images.decode import views

    assert 1 / EVALUATION_CROP == views._EVALUATION_COVER


def test_a_built_encoder_fits_what_timm_builds() -> None:
    ours = build_encoder(parse_arch(CONFIG.arch), CONFIG.image_px, 3)
    theirs = timm.create_model(timm_name(CONFIG), **timm_arguments(CONFIG, num_classes=0, pool="token"))
    assert isinstance(theirs, VisionTransformer)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *CONFIG.image_px)
    torch.testing.assert_close(
        theirs.eval().forward_features(images), encode(ours.eval(), images, None), rtol=1e-4, atol=1e-4
    )
