"""A micro-batch that does not fit is halved by a restart of the group, on all ranks together; a stated one is not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.errors import UserError
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from pipelines.config import ComputeConfig, DataConfig, FixedCompute, PretrainConfig
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.automatic import store_config, with_stored_micro_batch
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.worker.fitting import check_fits
from pipelines.worker.loop import TrainState
from pipelines.worker.rank import Rank
from pipelines.worker.resuming import RestartRequested
from tests.pipelines.worker.test_loop import rank_of

ALONE = rank_of(0, 1)


class BesideAFullGpu(Rank):
    """Rank 0 of two, of which the other has run out of memory."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + 1


@pytest.fixture
def job(tmp_path: Path) -> PretrainJob:
    """Return a run for which auto chose a micro-batch of 16."""
    model = ModelConfig(
        arch="vit_pico_patch4", image_px=(8, 8), decoder_depth=1, decoder_width=16, decoder_heads=2
    )  # fmt: skip
    config = PretrainConfig(data=DataConfig(batch=32, micro_batch=8), model=model)
    pixels = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    job = PretrainJob(folder=str(tmp_path / "run"), config=config, pixels=pixels, chosen=FixedCompute(micro_batch=16))
    store_config(job)
    return job


def check(job: PretrainJob, rank: Rank, capacity: int) -> None:
    """Check with a loss that runs out of memory above `capacity` images."""
    mae = build_mae(job.config.model, 0)

    def loss_of(model: nn.Module, batch: MicroBatch, step: int, index: int) -> Tensor:
        if len(batch.ids) > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum((parameter.sum() for parameter in model.parameters()), torch.zeros(()))

    state = TrainState.of(job.config, mae, mae, 1)
    blank = MicroBatch.blank(job.compute.micro_batch or 8, *job.input)
    check_fits(job, state, blank, loss_of, RunFolder(job.folder), rank)
    assert all(parameter.grad is None for parameter in mae.parameters())


def test_one_that_fits_is_kept(job: PretrainJob) -> None:
    check(job, ALONE, 16)
    assert not RunFolder(job.folder).restart_reason()
    assert with_stored_micro_batch(job) == job


@pytest.mark.parametrize(
    ("rank", "capacity"),
    [(ALONE, 10), (BesideAFullGpu(index=0, world=1, device=ALONE.device, compute=ALONE.compute), 16)],
)
def test_the_next_smaller_one_is_stored_and_a_restart_requested(job: PretrainJob, rank: Rank, capacity: int) -> None:
    with pytest.raises(RestartRequested, match="a micro-batch of 16 does not fit in the GPU's memory; trying 8"):
        check(job, rank, capacity)
    assert "trying 8" in RunFolder(job.folder).restart_reason()
    smaller = with_stored_micro_batch(job)
    assert smaller.compute.micro_batch == 8
    assert isinstance(smaller, PretrainJob)
    if rank is ALONE:
        check(smaller, rank, capacity)


def test_if_one_image_does_not_fit_the_remedy_is_another_model(job: PretrainJob) -> None:
    smallest = dataclasses.replace(job, chosen=FixedCompute(micro_batch=1))
    with pytest.raises(UserError, match="not even a micro-batch of 1 fits in the GPU's memory; try a smaller model"):
        check(smallest, ALONE, 0)


def test_one_that_the_user_stated_is_not_changed(job: PretrainJob) -> None:
    config = dataclasses.replace(job.config, compute=ComputeConfig(micro_batch=16))
    check(dataclasses.replace(job, config=config), ALONE, 10)
    assert not RunFolder(job.folder).restart_reason()
