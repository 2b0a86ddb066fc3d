"""The fast path computes the paper's loss and gradients, to float32 rounding."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.config import MaskConfig, ModelConfig
from mae_core.masking import sample_masks, training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.patches import gather
from mae_core.plain import plain_loss, plain_predict

KINDS: tuple[Literal["random", "block", "grid"], ...] = ("random", "block", "grid")
ATTENTIONS: tuple[Literal["self", "cross"], ...] = ("self", "cross")
shapes = st.sampled_from([("vit_pico_patch2", (8, 8)), ("vit_pico_patch4", (16, 8)), ("vit_pico_patch4", (8, 24))])


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    arch, image_px = draw(shapes)
    kind = draw(st.sampled_from(KINDS))
    attention = draw(st.sampled_from(ATTENTIONS))
    return ModelConfig(
        arch=arch,
        image_px=image_px,
        channels=draw(st.sampled_from([1, 3])),
        mask=MaskConfig(kind=kind, ratio=0.75 if kind == "grid" else draw(st.sampled_from([0.3, 0.5, 0.75, 0.87]))),
        decoder_depth=draw(st.integers(1, 3)),
        decoder_width=32,
        decoder_heads=4,
        mask_token_in=draw(st.sampled_from(["decoder", "encoder"])) if attention == "self" else "decoder",
        decoder_attention=attention,
        predicted_share=draw(st.sampled_from([1.0, 0.5, 0.2])),
        target=draw(st.sampled_from(["norm_pixels", "pixels"])),
    )


def loud(mae: MaskedAutoencoder) -> MaskedAutoencoder:
    """Change every bias, norm and token from its initial value, so that none can hide an error."""
    generator = torch.Generator().manual_seed(1)
    for parameter in mae.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return mae


def losses_and_gradients(mae: MaskedAutoencoder, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mae.zero_grad()
    (loss * torch.linspace(0.5, 2, len(loss))).sum().backward()
    return loss.detach(), {n: p.grad for n, p in mae.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.slow
@settings(max_examples=60)
@given(config=configs(), seed=st.integers(0, 99))
def test_loss_and_every_gradient_equal_the_plain_computation(config, seed):
    mae = loud(build_mae(config, seed))
    images = torch.randn(3, config.channels, *config.image_px, generator=torch.Generator().manual_seed(seed))
    mask = training_masks(config, seed=seed, epoch=0, sample_ids=torch.arange(3))
    fast, fast_grads = losses_and_gradients(mae, mae(images, mask))
    plain, plain_grads = losses_and_gradients(mae, plain_loss(mae, images, mask))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert fast_grads.keys() == plain_grads.keys() == {n for n, p in mae.named_parameters() if p.requires_grad}
    for name, gradient in plain_grads.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fast_grads[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-7, msg=name)


@pytest.mark.parametrize(("attention", "share"), [("self", 1.0), ("self", 0.3), ("cross", 1.0), ("cross", 0.3)])
def test_in_float64_fast_and_plain_loss_are_equal_to_twelve_digits(attention, share):
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(16, 24),
        decoder_depth=2,
        decoder_width=32,
        decoder_heads=4,
        decoder_attention=attention,
        predicted_share=share,
    )
    mae = loud(build_mae(config, 0)).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(2))
    torch.testing.assert_close(mae(images, mask), plain_loss(mae, images, mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictions_do_not_depend_on_the_memory_format(memory_format):
    config = ModelConfig(arch="vit_pico_patch4", image_px=(16, 16), decoder_depth=1, decoder_width=32, decoder_heads=4)
    mae = loud(build_mae(config, 0))
    images = torch.randn(2, 3, 16, 16).to(memory_format=memory_format)
    mask = sample_masks(config.mask, config.grid, seed=0, epoch=0, sample_ids=torch.arange(2))
    expected = gather(plain_predict(mae, images, mask), mask.hidden_ids)
    torch.testing.assert_close(mae.predict(images, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_predicting_some_patches_is_predicting_all_and_dropping_the_rest(attention):
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(16, 24),
        decoder_depth=2,
        decoder_width=32,
        decoder_heads=4,
        decoder_attention=attention,
        predicted_share=0.3,
    )
    mae = loud(build_mae(config, 0)).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    some = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(2))
    every = sample_masks(config.mask, config.grid, seed=0, epoch=0, sample_ids=torch.arange(2))
    places = (every.hidden_ids[:, None] == some.predicted_ids[..., None]).long().argmax(dim=2)
    assert torch.equal(every.hidden_ids.gather(1, places), some.predicted_ids)
    assert places.shape[1] == config.num_predicted == 5
    torch.testing.assert_close(
        mae.predict(images, some), gather(mae.predict(images, every), places), rtol=1e-12, atol=1e-12
    )


def test_with_cross_attention_mask_tokens_do_not_attend_to_each_other():
    config = ModelConfig(
        arch="vit_pico_patch4",
        image_px=(16, 24),
        decoder_depth=2,
        decoder_width=32,
        decoder_heads=4,
        decoder_attention="cross",
    )
    mae = loud(build_mae(config, 0))
    images = torch.randn(1, 3, 16, 24)
    mask = sample_masks(config.mask, config.grid, seed=0, epoch=0, sample_ids=torch.arange(1))
    moved = mae.decoder.pos_embed.data.clone()
    before = mae.predict(images, mask)
    moved[:, 1 + mask.hidden_ids[0, 1:]] += torch.randn(32)
    mae.decoder.pos_embed.data = moved
    after = mae.predict(images, mask)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert (after[:, 1:] - before[:, 1:]).abs().amax(dim=2).min() > 1e-3
