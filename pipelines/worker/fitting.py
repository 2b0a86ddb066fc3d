"""Find out whether the micro-batch that auto chose fits in the memory of every rank's GPU, and choose a smaller one.

The count of `mae_core.memory` decides first. This is the check of it, which no running out of memory ends:

1. Every rank runs one discarded iteration, beside as much memory as the optimizer will take. No collective is in it, so
   that a rank that runs out of memory leaves nobody waiting.
2. If it does not fit on any rank, rank 0 stores the next smaller micro-batch in the run's folder and requests a
   restart, since the feed is built for a size. Ray Train would count an error as a failure.
"""

import torch

from mae_core.errors import UserError
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.automatic import micro_batches, store_micro_batch
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import PretrainJob
from pipelines.worker.loop import LossOf, TrainState
from pipelines.worker.rank import Rank, no_sync
from pipelines.worker.resuming import RestartRequested


def check_fits(
    job: PretrainJob, state: TrainState, batch: MicroBatch, loss_of: LossOf, folder: RunFolder, rank: Rank
) -> None:
    """Return if the micro-batch fits on every rank. Every rank must call it.

    Raises RestartRequested on every rank if a smaller one is to be tried, and UserError if there is none.
    """
    num_short = rank.sum(torch.tensor(float(not _fits(state, batch, loss_of, rank)), device=rank.device)).item()
    size = job.compute.micro_batch
    if not num_short or size is None or job.config.compute.micro_batch != "auto":
        return  # A size that the user stated fails at the first step, with the remedy in the message.
    smaller = max((found for found in micro_batches(job.config, rank.world) if found < size), default=None)
    if smaller is None:
        raise UserError(f"not even a micro-batch of {size} fits in the GPU's memory; try a smaller model or image_px")
    cause = f"a micro-batch of {size} does not fit in the GPU's memory; trying {smaller}"
    if rank.is_main:
        store_micro_batch(folder, smaller)
        folder.request_restart(cause)
    rank.barrier()
    raise RestartRequested(cause)


def _fits(state: TrainState, batch: MicroBatch, loss_of: LossOf, rank: Rank) -> bool:
    """Run one discarded iteration; return whether the memory was enough."""
    fits = True
    try:
        num_weights = sum(parameter.numel() for parameter in state.model.parameters())
        moments = torch.empty(2 * num_weights, device=rank.device)
        with no_sync(state.model):
            (loss_of(state.model, batch, 0, 0) * 0.0).backward()
        del moments
    except torch.OutOfMemoryError:
        fits = False
    # After the handler, whose traceback holds the tensors of the iteration.
    state.optimizer.zero_grad(set_to_none=True)
    if rank.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits
