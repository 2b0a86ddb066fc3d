"""The stated count is what torch counts, matrix product by matrix product."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core.bench.config import StepConfig
from mae_core.bench.flops import plain_flops, step_flops
from mae_core.config import ModelConfig
from mae_core.masking import training_masks
from mae_core.model import build_mae
from mae_core.plain import plain_loss


def model(**fields) -> ModelConfig:
    return ModelConfig(arch="vit_pico_patch4", image_px=(16, 24), decoder_width=32, decoder_heads=4, **fields)


def counted(config: ModelConfig, compute) -> int:
    mae, images = build_mae(config, 0), torch.randn(2, 3, 16, 24)
    mask = training_masks(config, seed=0, epoch=0, sample_ids=torch.arange(2))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        compute(mae, images, mask).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("attention", "share"), [("self", 1.0), ("self", 0.3), ("cross", 1.0), ("cross", 0.3)])
def test_the_fast_path_takes_as_many_operations_as_are_stated(depth, attention, share):
    config = model(decoder_depth=depth, decoder_attention=attention, predicted_share=share)
    assert step_flops(config) == counted(config, lambda mae, images, mask: mae(images, mask))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_plain_computation_takes_as_many_operations_as_are_stated(depth):
    config = model(decoder_depth=depth)
    assert plain_flops(config) == counted(config, plain_loss)
    recipe = model(decoder_depth=depth, decoder_attention="cross", predicted_share=0.3)
    assert plain_flops(recipe) == plain_flops(config)


def test_the_ratios_of_the_cpu_targets():
    models = [StepConfig(decoder_depth=depth).of("vit_small_patch8") for depth in (8, 1)]
    assert [round(plain_flops(m) / step_flops(m), 3) for m in models] == [1.025, 1.093]
