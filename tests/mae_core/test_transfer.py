"""Laws of starting from other weights: all of an equal model, what fits of another, and the rest is named."""

import dataclasses

import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.encoder import export_tensors
from mae_core.errors import UserError
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.positions import sincos_2d
from mae_core.state import model_tensors
from mae_core.transfer import start_from, with_channels

CONFIG = ModelConfig(
    arch="vit_pico_patch4", image_px=(16, 24), channels=3, decoder_depth=2, decoder_width=32, decoder_heads=2
)


def changed(**fields: object) -> tuple[MaskedAutoencoder, ModelConfig]:
    config = dataclasses.replace(CONFIG, **fields)  # pyright: ignore[reportArgumentType]
    return build_mae(config, seed=1), config


def test_an_equal_model_takes_every_tensor() -> None:
    given, (mae, _) = build_mae(CONFIG, seed=0), changed()
    transfer = start_from(mae, model_tensors(given), CONFIG)
    assert set(transfer.taken) == set(mae.state_dict())
    assert not transfer.adapted
    assert not transfer.initial
    for name, tensor in mae.state_dict().items():
        assert torch.equal(tensor, given.state_dict()[name]), name


def test_an_encoder_alone_leaves_the_decoder_as_it_was() -> None:
    given, (mae, _) = build_mae(CONFIG, seed=0), changed()
    before = {name: tensor.clone() for name, tensor in mae.decoder.state_dict().items()}
    transfer = start_from(mae, export_tensors(given.encoder), CONFIG)
    assert all(name.startswith("decoder.") for name in transfer.initial)
    assert len(transfer.initial) == len(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mae.decoder.state_dict().items())
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(mae.encoder.state_dict()[name], given.encoder.state_dict()[name])


def test_another_image_size_resizes_both_position_tables() -> None:
    given, (mae, config) = build_mae(CONFIG, seed=0), changed(image_px=(32, 16))
    transfer = start_from(mae, model_tensors(given), CONFIG)
    assert set(transfer.adapted) == {"encoder.pos_embed", "decoder.pos_embed"}
    assert not transfer.initial
    assert torch.equal(mae.encoder.state_dict()["pos_embed"][0], sincos_2d(64, config.grid, class_tokens=1))


def test_a_smaller_decoder_takes_the_first_blocks_and_another_width_is_named() -> None:
    given, (mae, _) = build_mae(CONFIG, seed=0), changed(decoder_depth=1)
    assert not start_from(mae, model_tensors(given), CONFIG).initial
    deeper, _ = changed(decoder_depth=3)
    initial = start_from(deeper, model_tensors(given), CONFIG).initial
    assert initial
    assert all(name.startswith("decoder.blocks.2.") for name in initial)
    wider, _ = changed(decoder_width=64)
    assert {"decoder.embed.weight", "decoder.pred.weight", "decoder.pos_embed"} <= set(
        start_from(wider, model_tensors(given), CONFIG).initial
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_give_images_of_equal_channels_the_same_embedding(channels: int) -> None:
    given, (mae, _) = build_mae(CONFIG, seed=0), changed(channels=channels)
    transfer = start_from(mae, model_tensors(given), CONFIG)
    assert transfer.adapted == ("encoder.patch_embed.proj.weight",)
    assert set(transfer.initial) == {"decoder.pred.weight", "decoder.pred.bias"}
    gray = torch.randn(2, 1, 16, 24)
    torch.testing.assert_close(
        mae.encoder.patch_embed(gray.expand(-1, channels, -1, -1)),
        given.encoder.patch_embed(gray.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_channels_that_agree_are_left_alone() -> None:
    weight = torch.randn(8, 3, 4, 4)
    assert with_channels(weight, 3) is weight


@pytest.mark.parametrize(
    ("arch", "given"), [("vit_nano_patch4", "vit_pico_patch4"), ("vit_pico_patch4", "vit_nano_patch4")]
)
def test_another_size_of_encoder_is_refused_with_the_remedy(arch: str, given: str) -> None:
    (mae, _), (other, config) = changed(arch=arch), changed(arch=given)
    with pytest.raises(UserError, match=rf"weights are those of a {given}.*try --model.arch {given}"):
        start_from(mae, model_tensors(other), config)


def test_another_patch_size_keeps_the_initial_patch_embedding() -> None:
    given, (mae, _) = build_mae(CONFIG, seed=0), changed(arch="vit_pico_patch8")
    initial = start_from(mae, model_tensors(given), CONFIG).initial
    assert "encoder.patch_embed.proj.weight" in initial
    assert not any(name.startswith("encoder.blocks") for name in initial)
