"""The share of the attainable rate follows from counted operations; without a GPU nothing is measured."""

import dataclasses

import pytest
import torch

from mae_core.bench.flops import step_flops
from mae_core.config import ModelConfig
from mae_core.normalization import Normalization
from pipelines.config import PretrainConfig, ProgressiveConfig
from pipelines.runs.jobs import PretrainJob
from pipelines.worker.gpu_meter import GpuMeter, image_flops, mfu
from tests.pipelines.worker.test_loop import rank_of


def job_of(config: PretrainConfig) -> PretrainJob:
    return PretrainJob(folder="", config=config, pixels=Normalization(mean=(0.5,) * 3, std=(0.2,) * 3))


def test_the_share_is_that_of_the_measured_vit_base() -> None:
    """H200, 2026-11-27: 5,128 images/s of ViT-B/16 where a product runs at 776 TFLOP/s."""
    assert mfu(step_flops(ModelConfig()), 5128, 776e12) == pytest.approx(0.378, abs=1e-3)


def test_without_a_gpu_nothing_is_measured() -> None:
    assert GpuMeter.of(job_of(PretrainConfig()), 10, rank_of(0, 1)) is None


def test_the_operations_of_a_step_are_those_of_the_size_of_its_images() -> None:
    progressive = ProgressiveConfig(first_px=(96, 96), sizes=2, full_from=0.5)
    job = job_of(PretrainConfig(epochs=80, progressive=progressive, masks_per_image=2))
    flops_of = image_flops(job, 10)
    small, full = step_flops(ModelConfig(image_px=(96, 96))), step_flops(ModelConfig())
    assert [flops_of(step) for step in (0, 199, 200, 399)] == [2 * small, 2 * small, 2 * full, 2 * full]
    in_encoder = ModelConfig(mask_token_in="encoder")
    assert image_flops(job_of(PretrainConfig(model=in_encoder)), 10)(0) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run it on a machine with a GPU")
def test_on_a_gpu_the_shares_are_of_what_there_is() -> None:
    rank = dataclasses.replace(rank_of(0, 1), device=torch.device("cuda"))
    before = torch.cuda.get_rng_state()
    meter = GpuMeter.of(job_of(PretrainConfig()), 10, rank)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert meter is not None
    rate = meter.peak_flop_s / meter.flops_of(0)
    found = meter.read(rate / 2, 1)
    assert found["mfu"] == pytest.approx(0.5)
    assert 0 < found["gpu/memory"] < 1
