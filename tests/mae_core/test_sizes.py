"""Images of several sizes: a size computes what a model built for it computes with the same weights."""

import dataclasses
from typing import Any

import pytest
import torch

from mae_core.config import MaskConfig, ModelConfig, Size
from mae_core.errors import UserError
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.plain import plain_loss
from mae_core.positions import resized
from mae_core.transfer import start_from

CONFIG = ModelConfig(
    arch="vit_pico_patch4_cls2",
    image_px=(16, 24),
    decoder_depth=2,
    decoder_width=32,
    decoder_heads=4,
    predicted_share=0.5,
)
SMALL = (8, 16)


def case(config: ModelConfig) -> tuple[MaskedAutoencoder, MaskedAutoencoder]:
    """Return a model that takes images of `SMALL` as well, and one built for them, with the same trained weights."""
    generator = torch.Generator().manual_seed(1)
    mae = build_mae(config, 0)
    for parameter in mae.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    small = build_mae(dataclasses.replace(config, image_px=SMALL), 0)
    start_from(small, mae.state_dict(), config)
    mae.add_sizes([SMALL])
    return mae, small


def images_and_masks(config: ModelConfig, size: Size) -> tuple[torch.Tensor, Any]:
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(2))
    config = dataclasses.replace(config, image_px=size)
    return images, training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(3))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_attention": "cross", "encoder_layers": 2},
        {"mask_token_in": "encoder"},
        {"mask": MaskConfig(ratio=0.5, cell=2)},
    ],
    ids=["plain", "cross", "mask token in the encoder", "cells"],
)
def test_the_loss_and_its_gradient_are_those_of_a_model_of_the_size(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **fields)
    mae, small = case(config)
    images, mask = images_and_masks(config, SMALL)
    losses = [model(images, mask) for model in (mae, small)]
    assert torch.equal(*losses)
    gradients = []
    for model, loss in zip((mae, small), losses, strict=True):
        loss.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    torch.testing.assert_close(losses[1].detach(), plain_loss(small, images, mask).detach())


def test_further_sizes_change_nothing_at_full_size_and_nothing_that_is_saved() -> None:
    mae, _ = case(CONFIG)
    alone = build_mae(CONFIG, 0)
    alone.load_state_dict(mae.state_dict())
    images, mask = images_and_masks(CONFIG, CONFIG.image_px)
    assert torch.equal(mae(images, mask), alone(images, mask))
    assert mae.state_dict().keys() == alone.state_dict().keys()
    assert [name for name, _ in mae.named_buffers()] == []


def test_positions_that_are_not_sine_cosine_are_interpolated() -> None:
    mae = build_mae(CONFIG, 0)
    table = mae.encoder.pos_embed
    assert table is not None
    table.data += torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    mae.add_sizes([SMALL])
    images, mask = images_and_masks(CONFIG, SMALL)
    small = build_mae(dataclasses.replace(CONFIG, image_px=SMALL), 0)
    tensors = mae.state_dict() | {
        "encoder.pos_embed": resized(table.detach(), (4, 6), (2, 4), 2),
        "decoder.pos_embed": small.decoder.pos_embed,
    }
    small.load_state_dict(tensors)
    assert torch.equal(mae(images, mask), small(images, mask))


def test_a_size_is_named_before_it_is_used_and_is_whole_patches() -> None:
    mae = build_mae(CONFIG, 0)
    images, mask = images_and_masks(CONFIG, SMALL)
    with pytest.raises(AssertionError, match="add_sizes"):
        mae(images, mask)
    with pytest.raises(UserError, match="image side 10px is not a multiple of patch 4px"):
        mae.add_sizes([(8, 10)])
