"""What a file is said to be, from its keys."""

from typing import Any

import pytest
import timm
import torch
import transformers

from mae_core.errors import UserError
from mae_core.formats.recognise import KNOWN, recognise

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
}


@pytest.mark.parametrize("known", KNOWN)
def test_each_known_kind_is_found_by_its_keys(known):
    assert recognise(known.keys, "a.pth") == known


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("resnet18", "a ResNet"),
        ("beit_base_patch16_224", "a BEiT"),
        ("vit_base_patch16_clip_224", "a CLIP"),
        ("vit_small_patch14_reg4_dinov2", "a DINOv2"),
        ("swin_tiny_patch4_window7_224", "a Swin"),
        ("convnext_tiny", "a convolutional network"),
        ("deit_tiny_distilled_patch16_224", "a distilled DeiT"),
        ("vit_base_patch16_siglip_224", "a ViT with attention pooling"),
        ("vit_base_patch16_rpn_224", "a ViT without a class token"),
    ],
)
def test_timms_other_models_are_named(model, what):
    with torch.device("meta"):
        names = timm.create_model(model).state_dict().keys()
    with pytest.raises(UserError, match=rf"a\.pth is ({what}).*keys? \S+.*docs/weights\.md"):
        recognise(names, "a.pth")


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: transformers.BeitModel(transformers.BeitConfig(**SMALL)), "a BEiT"),
        (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)), "a DINOv2"),
        (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)), "a CLIP|is unknown"),
    ],
)
def test_other_models_of_transformers_are_named(build, what):
    model = build()
    with pytest.raises(UserError, match=what):
        recognise(model.state_dict().keys(), "a.pth")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["exp_avg/blocks.0.norm1.weight"], "an optimizer's state"),
        (["student.cls_token", "teacher.cls_token"], "a training checkpoint of DINO"),
        (["encoder.mask_token", "encoder.cls_token", "decoder.0.weight"], "a SimMIM"),
        (["encoder.cls_token", "decoder.embed.weight"], "an MAE of this project .*config.json"),
        (["cls_token", "fc_norm.weight", "patch_embed.proj.weight"], "without a final norm"),
        (["a", "b", "c", "d"], r"is unknown \(keys a, b, c and 1 more\)"),
    ],
)
def test_other_files_are_named_with_the_keys_that_tell(names, message):
    with pytest.raises(UserError, match=message):
        recognise(names, "a.pth")
