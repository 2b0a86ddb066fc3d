"""What `auto` stands for in compute options: a pure function of the config and of what there is.

The precision changes a run's result. It is chosen when the run starts and stays with its folder; everything else is
chosen anew whenever the run is launched. None of it is part of the run's identity.
"""

import dataclasses
import json
from typing import Any

from mae_core.errors import UserError
from mae_core.memory import pretrain_bytes
from pipelines.config import ClassifyConfig, ComputeConfig, FixedCompute, Precision, PretrainConfig, to_dict
from pipelines.machine import Machine
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Job

TASKS_PER_GPU = 16
"""Most data tasks per worker with a GPU: each decodes some 700 images/s, and a small model trains on 10,000."""

CHOSEN = "chosen.json"
"""File of a run folder with the compute options that the run was last launched with. Its config.json has them as they
were stated, for commands that repeat or extend the run on any machine."""

_PRECISIONS = ("float32", "bfloat16")
_GPU_SHARE = 0.85
"""Share of a GPU's memory that counted bytes may take; the rest is for the CUDA context and for fragments."""
_LARGEST_MICRO_BATCH = 1024
_IMAGES_BYTES = 128 * 2**20
"""Most bytes of a micro-batch's images, which travel in one block."""


def choose(config: PretrainConfig | ClassifyConfig, machine: Machine) -> FixedCompute:
    """Return the compute options with a value for every auto, for a run that starts on this machine."""
    asked = config.compute
    gpu = machine.num_gpus >= _least_workers(asked) if asked.gpu == "auto" else asked.gpu
    fixed = asked.fixed(FixedCompute(gpu=gpu))
    if not gpu:
        return fixed
    num_workers = asked.num_workers
    if num_workers == "auto":
        num_workers = max(1, machine.num_gpus - _evaluation_gpus(config))
    precision: Precision = "bfloat16" if machine.has_bfloat16 else "float32"
    # One core is for the driver, which also collects the garbage of the feed.
    data_tasks = min(machine.num_cores - num_workers - 1, TASKS_PER_GPU * num_workers)
    chosen = FixedCompute(
        gpu=True, num_workers=num_workers, precision=precision, compile=True, data_tasks=max(1, data_tasks)
    )
    return _with_micro_batch(config, asked.fixed(chosen), machine.gpu_bytes)


def _evaluation_gpus(config: PretrainConfig | ClassifyConfig) -> int:
    """Return how many GPUs the evaluations while pretraining need beside those of the workers."""
    return int(isinstance(config, PretrainConfig) and config.evaluate.gpu and config.evaluate.every_epochs > 0)


def _least_workers(compute: ComputeConfig) -> int:
    """Return the fewest workers that must each get a GPU if GPUs are used."""
    if compute.num_workers == "auto":
        return 1
    return compute.num_workers if compute.min_workers is None else compute.min_workers


def _with_micro_batch(config: PretrainConfig | ClassifyConfig, compute: FixedCompute, gpu_bytes: int) -> FixedCompute:
    """Choose the micro-batch if it is auto and the memory of the GPUs is known.

    In pretraining, a sample's crop, mask and loss do not depend on it. A classifier draws mixup and drop path for each
    micro-batch, so there it stays.
    """
    if compute.micro_batch is not None or not gpu_bytes or not isinstance(config, PretrainConfig):
        return compute
    found = largest_micro_batch(config, compute, gpu_bytes)
    return compute if found is None else dataclasses.replace(compute, micro_batch=found)


def largest_micro_batch(config: PretrainConfig, compute: FixedCompute, gpu_bytes: int) -> int | None:
    """Return the largest micro-batch that fits by count; None if not even one image fits."""
    sizes = micro_batches(config, compute.num_workers)
    fitting = (
        size for size in sizes if pretrain_bytes(config.model, size, compute.precision) <= gpu_bytes * _GPU_SHARE
    )
    return max(fitting, default=None)


def micro_batches(config: PretrainConfig, num_workers: int) -> list[int]:
    """Return the sizes to choose from: whole images that divide the global batch, the same for each worker if possible.

    Micro-batches that are missing to a multiple of the workers would be filled up with placeholders.
    """
    batch, views = config.data.batch, config.views_per_image
    image_bytes = config.model.image_px[0] * config.model.image_px[1] * config.model.channels
    most = min(batch, _LARGEST_MICRO_BATCH, max(1, _IMAGES_BYTES // image_bytes) * views)
    found = [size for size in range(views, most + 1, views) if batch % size == 0]
    return [size for size in found if batch // size % num_workers == 0] or found


def settle(job: Job, machine: Machine) -> Job:
    """Return the job with a value for every auto; a run that has started keeps its precision.

    It also keeps its micro-batch if that fits. Raises UserError if the config states another precision than auto chose
    when the run started.
    """
    folder, config = RunFolder(job.folder), job.config
    stored = _stored(folder)
    precision, micro_batch = stored.get("precision"), stored.get("micro_batch")
    if config.compute.precision == "auto" and precision in _PRECISIONS:
        config = _with_precision(config, precision)
    elif _states_another(job, folder, precision):
        raise UserError(
            f"run {job.folder} computes in {precision}, which auto chose when it started, not in "
            f"{config.compute.precision}; leave out --compute.precision, try another --name, or --fresh to replace it"
        )
    chosen = choose(config, machine)
    if chosen.micro_batch is not None and isinstance(micro_batch, int):
        # What was chosen for a smaller GPU, or found to fit, keeps the order of sums.
        chosen = dataclasses.replace(chosen, micro_batch=min(chosen.micro_batch, micro_batch))
    return dataclasses.replace(job, chosen=chosen)


def store_config(job: Job) -> None:
    """Write the job's config into its folder, as it was stated, and the compute options that it is launched with."""
    storage = RunFolder(job.folder).storage
    # In this order: a run of an earlier version has its precision in config.json alone.
    storage.write(CHOSEN, json.dumps(to_dict(job.compute), indent=1).encode())
    storage.write("config.json", json.dumps(to_dict(job.config), indent=1).encode())


def store_micro_batch(folder: RunFolder, size: int) -> None:
    """Store a smaller micro-batch for the run, because the chosen one did not fit in the memory of a GPU."""
    values = json.loads(folder.storage.read(CHOSEN))
    values["micro_batch"] = size
    folder.storage.write(CHOSEN, json.dumps(values, indent=1).encode())


def with_stored_micro_batch(job: Job) -> Job:
    """Return the job with the micro-batch that its workers stored, if they found that the chosen one does not fit."""
    stored, chosen = _stored(RunFolder(job.folder)).get("micro_batch"), job.chosen
    if chosen.micro_batch is None or not isinstance(stored, int):
        return job
    return dataclasses.replace(job, chosen=dataclasses.replace(chosen, micro_batch=min(stored, chosen.micro_batch)))


def _stored(folder: RunFolder) -> dict[str, Any]:
    """Return the compute options that the run was last launched with; empty if it has not started.

    Runs of earlier versions have them in config.json alone.
    """
    storage = folder.storage
    if storage.exists(CHOSEN):
        return json.loads(storage.read(CHOSEN))
    return json.loads(storage.read("config.json"))["compute"] if storage.exists("config.json") else {}


def _with_precision(config: PretrainConfig | ClassifyConfig, precision: Precision) -> PretrainConfig | ClassifyConfig:
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, precision=precision))


def _states_another(job: Job, folder: RunFolder, precision: Precision | None) -> bool:
    """Return whether auto chose the run's precision, and the config states another one with the same identity."""
    claimed = (folder.read_identity() or {}).get("config", {}).get("precision")
    return precision not in (None, job.config.compute.precision) and claimed == job.config.compute.precision


def settled_config(job: Job) -> PretrainConfig | ClassifyConfig:
    """Return the job's config with the value that was chosen for every auto, as MLflow shows it."""
    values = {name: value for name, value in vars(job.compute).items() if value is not None}
    return dataclasses.replace(job.config, compute=ComputeConfig(**values))


def describe_compute(config: PretrainConfig | ClassifyConfig, compute: FixedCompute, machine: Machine) -> str:
    """Say in one line what a run gets, such as "1 worker on NVIDIA H200, bfloat16, compiled, ..."."""
    parts = [
        f"{compute.num_workers} worker{'s' * (compute.num_workers > 1)} on {machine.gpu if compute.gpu else 'CPU'}",
        compute.precision,
        *(["compiled"] if compute.compile else []),
        f"micro-batch {compute.micro_batch or config.data.micro_batch}",
    ]
    where = f"{machine.num_cores} core{'s' * (machine.num_cores > 1)}"
    tasks = f"data tasks on the free CPUs of a cluster of {where}"
    if not machine.is_cluster:
        tasks = f"{compute.data_tasks} data task{'s' * (compute.data_tasks > 1)} on {where}"
    return ", ".join([*parts, tasks])


def is_automatic(compute: ComputeConfig) -> bool:
    """Return whether any of the options is left to the machine."""
    return "auto" in vars(compute).values()
