"""How a run is run: where, how it is tracked, and when its state is saved. None of it decides a result."""

import math
from dataclasses import dataclass
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where the work runs."""

    num_workers: int = 1
    """DDP workers, one GPU each where GPUs are used."""
    min_workers: int | None = None
    """Start, and go on, with as few workers as this where no more are to be had, and take more when they come; a
    change of their number starts the group again from the newest checkpoint. Without a value exactly num_workers."""
    gpu: bool = False
    """Give each worker a GPU and use NCCL; otherwise CPU and gloo."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward pass; bfloat16 on GPUs that have it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Only deterministic CUDA kernels, so that a resumed run equals an undisturbed one bit for bit on GPUs too."""
    threads: int = 1
    """CPU threads of one worker."""
    data_tasks: int = 2
    """Tasks that decode at the same time where Ray is embedded in this process, or where a cluster's workers hold all
    its CPUs; otherwise a cluster uses all free ones."""
    spread: bool = False
    """Spread workers over nodes instead of filling one node after another."""
    max_failures: int = 3
    """Worker failures after which a run ends with an error."""
    stall_s: float = 600.0
    """Seconds after which a worker that does not answer counts as failed; one that answers and does not join a
    collective so long and checkpoint.patience_s more, since it may be waiting for its checkpoint."""
    on_nan: Literal["stop", "skip", "roll_back"] = "stop"
    """What a gradient that is not finite leads to, beside the sample ids in the log: an end of the run; a step without
    an update; or a return to the newest checkpoint, from which the steps up to the bad one are left out."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads", "data_tasks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise UserError(
                f"min_workers {self.min_workers} is not between 1 and num_workers {self.num_workers}; try 1"
            )
        if self.stall_s <= 0:
            raise UserError(f"stall_s {self.stall_s:g} is not positive; try 600")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What MLflow is told. The server is chosen by MLFLOW_TRACKING_URI; without it a local sqlite file is used."""

    experiment: str = "mae"
    """MLflow experiment of the run."""
    register: bool = True
    """Register the result as a new model version, with alias @candidate."""
    name: str = ""
    """Registered model; empty for mae-<arch>, or <backbone>-classifier."""
    log_every_steps: int = 10
    """Steps between two points of every metric."""
    pictures_every_epochs: int = 10
    """Epochs between two pictures of reconstructions."""

    def __post_init__(self) -> None:
        check_model_name(self.name)
        for name in ("log_every_steps", "pictures_every_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 10")


def check_model_name(name: str) -> None:
    if set(name) & set("/:"):
        raise UserError(f"name {name!r} of a registered model holds / or :, which MLflow refuses; try -")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When training state is saved."""

    every_epochs: float = 1.0
    """Epochs between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints of the best val/top1 that are kept too; where none was evaluated on val, as in pretraining, of the
    lowest training loss."""
    keep_every_epochs: int | None = None
    """Checkpoints of every so many epochs are kept too, for good; without a value none."""
    patience_s: float = 300.0
    """How long a checkpoint that the storage refuses is tried again, while training goes on, before the run fails."""

    def __post_init__(self) -> None:
        if not 0 < self.every_epochs < math.inf or self.keep < 1:
            raise UserError("every_epochs must be positive and keep at least 1; try 1 and 2")
        if self.keep_best < 0 or self.patience_s < 0:
            raise UserError("keep_best and patience_s must be at least 0; try 0 and 300")
        if self.keep_every_epochs is not None and self.keep_every_epochs < 1:
            raise UserError(f"keep_every_epochs {self.keep_every_epochs} is below 1; try 100, or leave it out")
