"""The share of the attainable rate follows from counted operations; without a GPU nothing is measured."""

import dataclasses

import pytest
import torch

from mae_core.bench.flops import step_flops
from mae_core.config import ModelConfig
from pipelines.worker.gpu_meter import GpuMeter, mfu
from tests.pipelines.worker.test_loop import rank_of


def test_the_share_is_that_of_the_measured_vit_base() -> None:
    """H200, 2026-11-27: 5,128 images/s of ViT-B/16 where a product runs at 776 TFLOP/s."""
    assert mfu(step_flops(ModelConfig()), 5128, 776e12) == pytest.approx(0.378, abs=1e-3)


def test_without_a_gpu_nothing_is_measured() -> None:
    assert GpuMeter.of(ModelConfig(), 1, rank_of(0, 1)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run it on a machine with a GPU")
def test_on_a_gpu_the_shares_are_of_what_there_is() -> None:
    rank = dataclasses.replace(rank_of(0, 1), device=torch.device("cuda"))
    before = torch.cuda.get_rng_state()
    meter = GpuMeter.of(ModelConfig(), 1, rank)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert meter is not None
    rate = meter.peak_flop_s / meter.flops
    found = meter.read(rate / 2)
    assert found["mfu"] == pytest.approx(0.5)
    assert 0 < found["gpu/memory"] < 1
