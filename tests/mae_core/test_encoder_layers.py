"""Decoder blocks that read a mixture of several encoder blocks: what it starts as, and what it computes."""

import dataclasses

import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.errors import UserError
from mae_core.masking import training_masks
from mae_core.model import MaskedAutoencoder, build_mae
from mae_core.optim import param_groups
from mae_core.plain import plain_loss

CONFIG = ModelConfig(
    arch="vit_pico_patch4_cls2",
    image_px=(16, 24),
    decoder_depth=3,
    decoder_width=32,
    decoder_heads=4,
    decoder_attention="cross",
    predicted_share=0.5,
    encoder_layers=2,
)


def case(config: ModelConfig, noise: float) -> tuple[MaskedAutoencoder, torch.Tensor]:
    """Return a model whose parameters differ from their initial values by noise, and images, in float64."""
    generator = torch.Generator().manual_seed(1)
    mae = build_mae(config, 0)
    for parameter in mae.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return mae.double(), torch.randn(2, 3, *config.image_px, generator=generator, dtype=torch.float64)


def test_the_loss_and_the_gradient_of_the_mixture_equal_the_plain_computation() -> None:
    mae, images = case(CONFIG, 0.1)
    mask = training_masks(CONFIG, seed=0, epoch=0, sample_ids=torch.arange(2))
    assert mae.decoder.mixture is not None
    found = []
    for loss in (mae(images, mask), plain_loss(mae, images, mask)):
        mae.zero_grad()
        loss.sum().backward()
        assert mae.decoder.mixture.grad is not None
        found.append((loss.detach(), mae.decoder.mixture.grad.clone()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[0][1].abs().min() > 0


def test_it_starts_as_a_decoder_that_reads_the_last_block_alone() -> None:
    mae, images = case(CONFIG, 0.0)
    last = build_mae(dataclasses.replace(CONFIG, encoder_layers=1), 0).double()
    assert mae.state_dict().keys() - last.state_dict().keys() == {"decoder.mixture"}
    assert all(torch.equal(tensor, mae.state_dict()[name]) for name, tensor in last.state_dict().items())
    mask = training_masks(CONFIG, seed=0, epoch=0, sample_ids=torch.arange(2))
    torch.testing.assert_close(mae(images, mask), last(images, mask), rtol=1e-12, atol=0)


def test_pictures_are_drawn_from_the_mixture_too() -> None:
    mae, images = case(CONFIG, 0.1)
    mask = training_masks(dataclasses.replace(CONFIG, predicted_share=1.0), seed=0, epoch=0, sample_ids=torch.arange(2))
    before = mae.reconstruct(images, mask)[1]
    assert mae.decoder.mixture is not None
    mae.decoder.mixture.data[0, 0] += 1
    assert (mae.reconstruct(images, mask)[1] - before).abs().max() > 1e-6


@pytest.mark.parametrize(("num", "blocks"), [(1, (3,)), (2, (1, 3)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))])
def test_blocks_are_evenly_spaced_and_end_with_the_last(num: int, blocks: tuple[int, ...]) -> None:
    assert dataclasses.replace(CONFIG, encoder_layers=num).mixed_blocks == blocks


def test_the_mixture_is_not_decayed() -> None:
    mae, _ = case(CONFIG, 0.0)
    [group] = [g for g in param_groups(mae, 0.1, 1.0) if any(p is mae.decoder.mixture for p in g["params"])]
    assert group["weight_decay"] == 0


def test_layers_that_cannot_be_read_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"--model\.decoder-attention cross"):
        dataclasses.replace(CONFIG, decoder_attention="self")
    with pytest.raises(UserError, match="1 to the 4 blocks of vit_pico_patch4_cls2; try 4"):
        dataclasses.replace(CONFIG, encoder_layers=5)
