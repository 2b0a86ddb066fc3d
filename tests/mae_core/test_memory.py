"""The count of a step's memory is that of the measurements on a GPU, and never below them."""

import pytest

from mae_core.config import ModelConfig
from mae_core.memory import num_parameters, pretrain_bytes
from mae_core.model import build_mae


@pytest.mark.parametrize(
    ("arch", "micro_batch", "measured_gib"),
    [("vit_base_patch16", 256, 13.0), ("vit_large_patch16", 256, 22.5), ("vit_huge_patch14", 128, 24.9)],
)
def test_it_is_at_most_a_tenth_above_what_was_measured(arch: str, micro_batch: int, measured_gib: float) -> None:
    counted_gib = pretrain_bytes(ModelConfig(arch=arch), micro_batch, "bfloat16") / 2**30
    assert measured_gib <= counted_gib <= 1.1 * measured_gib


def test_parameters_are_counted_to_within_a_hundredth() -> None:
    config = ModelConfig(arch="vit_small_patch16")
    counted = sum(parameter.numel() for parameter in build_mae(config, seed=0).parameters() if parameter.requires_grad)
    assert num_parameters(config) == pytest.approx(counted, rel=0.01)


def test_a_decoder_that_predicts_fewer_tokens_takes_less() -> None:
    full, part = ModelConfig(), ModelConfig(decoder_attention="cross", predicted_share=0.25)
    assert pretrain_bytes(part, 64, "bfloat16") < pretrain_bytes(full, 64, "bfloat16")
    assert pretrain_bytes(full, 64, "bfloat16") < pretrain_bytes(full, 64, "float32")
