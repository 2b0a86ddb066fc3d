"""Agree on the checkpoint that all ranks of a group resume from, and read it once.

1. Rank 0 names the step of the newest complete checkpoint, as the controller did when it built the feed. Both look at
   manifests and file sizes only.
2. Every rank reads and hashes each file of that checkpoint once.
3. If any rank finds a file damaged, rank 0 deletes the checkpoint's manifest and requests a restart in the run's
   folder. All ranks then leave without an error, since the feed was built for the wrong step, and the driver launches
   the group again. Ray Train would count an error as a failure, and `compute.max_failures` is for other causes.
"""

import logging

import torch

from mae_core.errors import UserError
from pipelines.runs.checkpoints import Checkpoint
from pipelines.runs.folder import RunFolder
from pipelines.worker.rank import Rank

log = logging.getLogger(__name__)


class RestartRequested(Exception):
    """The group must be launched again with another feed; the reason is in the run folder."""


def load_newest(folder: RunFolder, rank: Rank) -> Checkpoint | None:
    """Load the checkpoint to resume from, the same on every rank; None if the run has none.

    Raises RestartRequested on every rank if one of them finds it damaged. Every rank must call it.
    """
    step = rank.agree(folder.checkpoints.latest_step() if rank.is_main else 0)
    if not step:
        return None
    checkpoint = None
    try:
        checkpoint = folder.checkpoints.load(step)
    except UserError as error:
        log.warning("rank %d cannot resume from step %d: %s", rank.index, step, error)
    num_damaged = rank.sum(torch.tensor(float(checkpoint is None), device=rank.device)).item()
    if num_damaged:
        cause = f"the checkpoint of step {step} in {folder.storage.uri} is damaged"
        if rank.is_main:
            folder.checkpoints.discard(step)
            folder.request_restart(cause)
        rank.barrier()
        raise RestartRequested(cause)
    return checkpoint
