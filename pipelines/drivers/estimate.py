"""`mae pretrain --estimate`: what a run will take, from its own model's steps on this machine for a moment.

1. Micro-batches of blank images go forward and backward for some seconds, and the optimizer steps, as on a rank.
2. A step takes its rank's micro-batches times that, and one update. Steps, checkpoints and their bytes are counted.

Not in it: waiting for images, sums of gradients over ranks, checkpoints, restarts. The estimate is stored below the
output folder, and the run compares it at its end with what it took.
"""

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mae_core.errors import UserError
from pipelines.drivers.drive import PublishedJob
from pipelines.machine import this_machine
from pipelines.runs.automatic import settle
from pipelines.runs.estimates import Estimate, num_kept, store
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import last_step, train_plan

if TYPE_CHECKING:
    from pipelines.worker.calibrating import Calibration

log = logging.getLogger(__name__)

CALIBRATION_S = 40.0
"""Time of the measured micro-batches, without that of building and compiling the model."""


def estimate(published: PublishedJob, price: float | None, seconds: float | None = None) -> dict[str, Any]:
    """Measure, calculate and store the estimate of a run; return its values, with `text` for people.

    Raises UserError for a negative price, and if the job's GPUs are not on this machine.
    """
    if price is not None and price < 0:
        raise UserError(f"estimate-price {price:g} is negative; try the price of one GPU for an hour, such as 2.5")
    here = this_machine()
    job = settle(published.job, here)
    assert isinstance(job, PretrainJob)
    if job.compute.gpu and not here.num_gpus:
        raise UserError(
            "the steps of a run on GPUs cannot be measured without one; run --estimate on a node with a GPU"
        )
    from pipelines.worker.calibrating import calibrate

    seconds = seconds or CALIBRATION_S
    log.info("measuring steps of %s for about %g s", job.config.model.arch, seconds)
    found = calculated(replace(published, job=job), calibrate(job, published.dataset, seconds), price)
    store(job.config.output, found)
    return asdict(found) | {"cost": found.cost, "text": found.text}


def calculated(published: PublishedJob, measured: "Calibration", price: float | None) -> Estimate:
    """Calculate what the run takes, from what was measured of its steps."""
    job = published.job
    assert isinstance(job, PretrainJob)
    plan, compute = train_plan(job, published.dataset), job.compute
    steps = last_step(job, plan.steps_per_epoch) - job.first_epoch * plan.steps_per_epoch
    step_s = plan.micro_batches_per_step // compute.num_workers * measured.micro_batch_s + measured.update_s
    hours = steps * step_s / 3600
    per_device = 1 if compute.gpu else compute.threads
    return Estimate(
        name=published.name,
        steps=steps,
        step_s=step_s,
        hours=hours,
        num_devices=compute.num_workers * per_device,
        device="gpu" if compute.gpu else "cpu",
        device_hours=hours * compute.num_workers * per_device,
        storage_bytes=num_kept(job.reading) * measured.checkpoint_bytes + measured.export_bytes,
        price=price,
    )
