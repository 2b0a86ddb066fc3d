"""Converted weights compute what they computed in the library that they came from, to float32 rounding."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from mae_core.classifier import build_classifier
from mae_core.config import ClassifierConfig, ModelConfig, parse_arch
from mae_core.encoder import build_encoder, encode
from mae_core.errors import UserError
from mae_core.formats import fair
from mae_core.formats.hints import Hints, from_arguments, from_transformers, normalization_of
from mae_core.formats.reading import Checkpoint
from mae_core.formats.weights import Weights, convert
from mae_core.masking import mask_from_noise
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.patches import gather
from tests.mae_core.formats.pico import CONFIG, DECODER_SIZES, SIZES


def scrambled(model: nn.Module) -> Any:
    """Return the model with every tensor random, small enough for an epsilon of 1e-6 to matter."""
    random = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        norm_weight = "norm" in name and name.endswith("weight")
        tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.02 + float(norm_weight))
    return model.eval()


def converted(model: nn.Module, hints: Hints | None = None, **more: Any) -> Weights:
    return convert(Checkpoint(tensors=model.state_dict()), dataclasses.replace(hints or Hints(), **more), "a.pth")


def built(weights: Weights) -> Any:
    model = weights.model
    arch = parse_arch(model.arch)
    if weights.kind == "mae":
        module: nn.Module = MaskedAutoencoder(model)
    elif weights.kind == "encoder":
        module = build_encoder(arch, model.image_px, model.channels, norm_eps=model.norm_eps)
    else:
        config = ClassifierConfig(pool=weights.pool)
        module = build_classifier(arch, model.image_px, model.channels, len(weights.classes), config, model.norm_eps)
    module.load_state_dict(weights.tensors)
    return module.eval()


def images(num: int = 3, image_px: tuple[int, int] = (28, 28), channels: int = 3) -> Tensor:
    return torch.randn(num, channels, *image_px, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * max(1, expected.abs().max().item()))


def vit(**changes: Any) -> Any:
    sizes = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 5}
    return scrambled(timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes}))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_an_mae_of_transformers_has_its_loss_and_predictions(norm_pix_loss):
    config = ViTMAEConfig(**SIZES, **DECODER_SIZES, norm_pix_loss=norm_pix_loss, mask_ratio=0.6)
    theirs = scrambled(ViTMAEForPreTraining(config))
    weights = converted(theirs, from_transformers(config.to_dict()))
    assert (weights.kind, weights.model.norm_eps, weights.model.mask.ratio) == ("mae", 1e-12, 0.6)
    ours, pixels, noise = built(weights), images(), torch.rand(3, 49)
    with torch.no_grad():
        expected = theirs(pixels, noise=noise)
        mask = mask_from_noise(noise, weights.model.num_visible)
        assert_close(ours(pixels, mask).mean(), expected.loss)
        assert_close(ours.predict(pixels, mask), gather(expected.logits, mask.predicted_ids))


def test_the_epsilon_of_the_layer_norms_matters_and_travels():
    theirs = scrambled(ViTModel(ViTConfig(**SIZES)))
    weights = converted(theirs, from_transformers(theirs.config.to_dict()))
    with torch.no_grad():
        expected = theirs(images()).last_hidden_state
        assert_close(encode(built(weights), images(), None), expected)
        wrong = dataclasses.replace(weights, model=dataclasses.replace(weights.model, norm_eps=1e-6))
        assert (encode(built(wrong), images(), None) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    "build", [lambda c: ViTModel(ViTConfig(**c)), lambda c: ViTMAEModel(ViTMAEConfig(**c, mask_ratio=0.0))]
)
def test_encoders_of_transformers_have_their_latents(build, qkv_bias):
    theirs = scrambled(build({**SIZES, "qkv_bias": qkv_bias}))
    options = {"noise": torch.arange(49.0).expand(3, -1)} if isinstance(theirs, ViTMAEModel) else {}
    weights = converted(theirs, from_transformers(theirs.config.to_dict()))
    assert ("set the biases of attention, which has none, to 0" in weights.notes) == (not qkv_bias)
    with torch.no_grad():
        assert_close(encode(built(weights), images(), None), theirs(images(), **options).last_hidden_state)


def test_a_classifier_of_transformers_has_its_logits_and_class_names():
    config = ViTConfig(**SIZES, id2label={0: "cat", 1: "dog", 2: "cow"})
    theirs = scrambled(ViTForImageClassification(config))
    weights = converted(theirs, from_transformers(config.to_dict()))
    assert (weights.kind, weights.pool, weights.classes) == ("classifier", "token", ("cat", "dog", "cow"))
    with torch.no_grad():
        assert_close(built(weights)(images()), theirs(images()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pool", "norm"), [("token", "norm"), ("avg", "fc_norm")])
def test_a_classifier_of_timm_has_its_logits_pooled_by_the_norm_that_it_has(pool, norm, dtype):
    theirs = vit(global_pool=pool).to(dtype)
    weights = converted(theirs)
    assert (weights.kind, weights.pool, weights.classes) == ("classifier", pool, ("0", "1", "2", "3", "4"))
    assert f"{norm}.weight" in weights.tensors
    with torch.no_grad():
        assert_close(built(weights)(images()), theirs.float()(images()))


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": False}, {"no_embed_class": True}, {"img_size": (16, 48)}, {"in_chans": 1}]
)
def test_other_shapes_of_timms_encoder_have_its_features(changes):
    theirs = vit(num_classes=0, **changes)
    weights = converted(theirs, image_px=theirs.patch_embed.img_size)
    pixels = images(2, weights.model.image_px, weights.model.channels)
    with torch.no_grad():
        assert_close(encode(built(weights), pixels, None), theirs.forward_features(pixels))


def test_a_mask_token_that_timm_refuses_is_left_out():
    theirs = vit(num_classes=0)
    tensors = theirs.state_dict() | {"mask_token": torch.zeros(1, 1, 512)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mask_token"):
        theirs.load_state_dict(tensors)
    weights = convert(Checkpoint(tensors=tensors), Hints(), "a.pth")
    assert weights.notes == ("left out a mask token without a decoder",)
    assert weights.tensors.keys() == theirs.state_dict().keys()


def test_a_linear_probe_of_the_reference_has_its_logits():
    theirs = vit()
    norm = nn.BatchNorm1d(64, affine=False, eps=1e-6)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    theirs.head = nn.Sequential(norm, theirs.head)
    weights = converted(theirs)
    assert (weights.kind, weights.pool, weights.notes) == ("classifier", "token", ())
    with torch.no_grad():
        assert_close(built(weights)(images()), theirs.eval()(images()))


def test_an_mae_of_the_reference_comes_in_with_its_decoder():
    mae = scrambled(build_mae(CONFIG, seed=0))
    checkpoint = Checkpoint(tensors=fair.from_ours(mae.state_dict()))
    weights = convert(checkpoint, dataclasses.replace(from_arguments({"norm_pix_loss": False}), decoder_heads=4), "a")
    assert weights.model == dataclasses.replace(CONFIG, target="pixels")
    assert weights.notes == ()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in mae.state_dict().items())
    assert weights.summary == "vit_pico_patch4 at 28 x 28 px, 3 channels, decoder 2 x 32"


def test_what_a_file_does_not_say_about_the_target_is_assumed_and_said():
    tensors = fair.from_ours(build_mae(CONFIG, seed=0).state_dict())
    weights = convert(Checkpoint(tensors=tensors), Hints(decoder_heads=4), "a.pth")
    assert weights.model.target == "norm_pixels"
    assert any("--target pixels" in note for note in weights.notes)


@pytest.mark.slow
def test_a_checkpoint_of_vit_bs_real_size_in_the_references_layout_goes_in_and_out():
    random = torch.Generator().manual_seed(0)
    mae = MaskedAutoencoder(ModelConfig())
    theirs = {n: torch.randn(t.shape, generator=random) for n, t in fair.from_ours(mae.state_dict()).items()}
    weights = convert(Checkpoint(tensors=theirs), Hints(target="norm_pixels"), "mae_pretrain_vit_base_full.pth")
    assert (weights.model, weights.notes) == (ModelConfig(), ())
    built(weights)
    back = fair.from_ours(weights.tensors)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = {**vit(num_classes=0).state_dict(), **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "hints", "message"),
    [
        (changed(norm__bias=None), Hints(), r"lack 'norm\.bias' \(1 are missing\)"),
        (changed(extra=torch.zeros(1)), Hints(), r"have 'extra' \(1 are unknown\)"),
        (changed(blocks__3__mlp__fc1__weight=torch.zeros(128, 64)), Hints(), r"is \(128, 64\) instead of \(256, 64\)"),
        (changed(patch_embed__proj__weight=torch.zeros(64, 3, 2, 4, 4)), Hints(), r"patches are squares of images"),
        (changed(norm__weight=torch.full((64,), float("nan"))), Hints(), r"norm\.weight holds NaN"),
        (changed(norm__weight=torch.zeros(64, dtype=torch.int8)), Hints(), r"torch\.int8: quantized"),
        (changed(), Hints(heads=8), r"width 64 and depth 4 has 4 heads here \(vit_pico\), not 8"),
        (changed(), Hints(image_px=(28, 32)), r"28 x 32 px have 56 patches of 4 px, but .* for 49"),
        (changed(), Hints(pool="avg"), r"pools by avg but its final norm is norm"),
        (changed(pos_embed=torch.zeros(1, 13, 64)), Hints(), r"for 12 patches, .*--image-px HEIGHT WIDTH"),
        (vit(num_classes=0, depth=3).state_dict(), Hints(), r"width 64 and depth 3 is none of the sizes .*SIZES"),
        (vit().state_dict(), Hints(classes=("a", "b")), r"2 class names are given, but the head has 5"),
    ],
)
def test_what_cannot_be_converted_is_an_error_with_a_remedy(tensors, hints, message):
    with pytest.raises(UserError, match=message):
        convert(Checkpoint(tensors=tensors), hints, "a.pth")


def test_heads_of_an_unofficial_decoder_must_be_given():
    tensors = fair.from_ours(build_mae(CONFIG, seed=0).state_dict())
    with pytest.raises(UserError, match=r"decoder of width 32 .*--decoder-heads"):
        convert(Checkpoint(tensors=tensors), Hints(), "a.pth")


def test_transformers_weights_need_their_config():
    with pytest.raises(UserError, match=r"ViTModel .*config\.json"):
        converted(ViTModel(ViTConfig(**SIZES)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "beit"}, r"'beit' model of transformers; give a ViTMAE or a ViT"),
        ({"model_type": "vit", "hidden_act": "quick_gelu"}, r"'quick_gelu'; only gelu"),
    ],
)
def test_other_models_configs_are_named(config, message):
    with pytest.raises(UserError, match=message):
        from_transformers(config)


def test_normalization_comes_from_the_preprocessor():
    found = normalization_of({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "do_normalize": True})
    assert found is not None
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert normalization_of({}) is None
