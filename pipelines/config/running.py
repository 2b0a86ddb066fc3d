"""Options of compute, tracking and checkpoints. Except for precision and reduce_in, none changes a run's result."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mae_core.config import ADDED
from mae_core.errors import UserError

Auto: TypeAlias = Literal["auto"]
Precision: TypeAlias = Literal["float32", "bfloat16"]
_TAG = re.compile(r"(?!mae\.|mlflow\.|sha256\.)[\w.-]{1,100}=.{0,4000}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Workers, devices and what happens when they fail. `mae doctor` shows what auto chooses here."""

    num_workers: int | Auto = "auto"
    """DDP workers, each with one GPU if GPUs are used. auto: one for each GPU, but for that of
    evaluate.gpu, or one if there is none."""
    min_workers: int | None = None
    """Fewest workers to start or continue with if no more are available; more are added when they become available.
    A change of their number restarts the group from the newest checkpoint. If not set, exactly num_workers."""
    gpu: bool | Auto = "auto"
    """Give each worker a GPU and use NCCL; otherwise CPU and gloo. auto: if there are as many GPUs as workers."""
    precision: Precision | Auto = "auto"
    """Autocast type of the forward pass. auto: bfloat16 on GPUs that support it, else float32, as chosen when the run
    starts; resuming it keeps the choice, on any machine."""
    reduce_in: Literal["float32", "bfloat16"] = field(default="float32", metadata=ADDED)
    """Type in which gradients are summed over workers; bfloat16 sends half the bytes, and sums with 8 bits."""
    bucket_mib: int | None = field(default=None, metadata=ADDED)
    """MiB of gradients that are summed at a time, while the backward pass computes the next. If not set, 25, and 1 for
    the first."""
    compile: bool | Auto = "auto"
    """Compile the model with torch.compile. auto: on GPUs."""
    micro_batch: int | Auto = "auto"
    """Samples per forward pass in place of data.micro_batch. auto: in pretraining on GPUs the largest that fits by
    count, up to 1024; else data.micro_batch. Sums of gradients are rounded in another order; nothing else changes."""
    deterministic: bool = False
    """Use deterministic CUDA kernels only, so that a resumed run equals an uninterrupted one bit for bit on GPUs."""
    threads: int = 1
    """CPU threads per worker."""
    data_tasks: int | Auto = "auto"
    """Concurrent decoding tasks if Ray is embedded in this process, or if workers hold all CPUs of a cluster; otherwise
    a cluster uses all free CPUs. auto: with GPUs every core that neither a worker nor the driver needs, at most 16 a
    worker; else 2."""
    spread: bool = False
    """Spread workers over nodes instead of filling one node after the other."""
    max_failures: int = 3
    """Worker failures after which a run fails."""
    stall_s: float = 600.0
    """Seconds after which a worker that does not answer counts as failed. A worker that answers but does not join a
    collective has checkpoint.patience_s more, since it may be retrying to write a checkpoint."""
    grace_s: float = 25.0
    """Seconds to wait for a checkpoint of the present step after SIGTERM or Ctrl-C; without one by then, the run ends
    with the newest. Kubernetes kills a pod 30 s after SIGTERM."""
    on_nan: Literal["stop", "skip", "roll_back"] = "stop"
    """What to do if a gradient is not finite; the sample ids are logged in any case. stop: end the run; skip: skip the
    update of this step; roll_back: return to the newest checkpoint and skip all steps from there to the bad one."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads", "data_tasks", "micro_batch"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name} {value} is below 1; try 1")
        if self.min_workers is None:
            pass
        elif self.num_workers == "auto":
            raise UserError(f"min_workers {self.min_workers} needs a num_workers; try --compute.num-workers 8")
        elif not 1 <= self.min_workers <= self.num_workers:
            raise UserError(
                f"min_workers {self.min_workers} is not between 1 and num_workers {self.num_workers}; try 1"
            )
        if self.bucket_mib is not None and self.bucket_mib < 1:
            raise UserError(f"bucket_mib {self.bucket_mib} is below 1; try 25")
        if self.grace_s < 0:
            raise UserError(f"grace_s {self.grace_s:g} is negative; try 25, or 0 to end without a checkpoint")
        if self.stall_s <= 0:
            raise UserError(f"stall_s {self.stall_s:g} is not positive; try 600")

    def fixed(self, chosen: "FixedCompute | None" = None) -> "FixedCompute":
        """Return a copy in which every auto is replaced by the value of `chosen`; without it, by that of a CPU."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen = chosen or FixedCompute()
        return FixedCompute(**{name: getattr(chosen, name) if v == "auto" else v for name, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class FixedCompute(ComputeConfig):
    """Compute options with a value for every auto; the defaults are those of a machine without GPUs."""

    num_workers: int = 1
    gpu: bool = False
    precision: Precision = "float32"
    compile: bool = False
    micro_batch: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride] -- a choice has no auto
    """None for data.micro_batch."""
    data_tasks: int = 2


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is logged to MLflow: the server of MLFLOW_TRACKING_URI, or a local sqlite file if that is not set."""

    experiment: str = "mae"
    """MLflow experiment of the run."""
    register: bool = True
    """Register the result as a new model version, with alias @candidate."""
    name: str = ""
    """Registered model; empty for mae-<arch>, or <backbone>-classifier."""
    log_every_steps: int = 10
    """Steps between two points of a metric."""
    pictures_every_epochs: int = 10
    """Epochs between two pictures of reconstructions."""
    tags: tuple[str, ...] = field(default=(), metadata=ADDED)
    """Tags KEY=VALUE of the run and of the model version that it registers, such as team=vision."""

    wandb: str = field(default="", metadata=ADDED)
    """Project of Weights & Biases that gets the metrics and pictures, too; WANDB_MODE=offline writes them to files."""
    tensorboard: str = field(default="", metadata=ADDED)
    """Folder of this machine that gets an event file of TensorBoard for each run, too."""

    @property
    def tag_values(self) -> dict[str, str]:
        """The values of `tags` by key."""
        return {key: value for key, _, value in (tag.partition("=") for tag in self.tags)}

    def __post_init__(self) -> None:
        check_model_name(self.name)
        for tag in self.tags:
            if not _TAG.fullmatch(tag):
                raise UserError(
                    f"tag {tag!r} is not KEY=VALUE with a key other than mae.*, mlflow.* and sha256.*; try team=vision"
                )
        for name in ("log_every_steps", "pictures_every_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 10")


def check_model_name(name: str) -> None:
    if set(name) & set("/:"):
        raise UserError(f"name {name!r} of a registered model contains / or :, which MLflow refuses; try -")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_epochs: float = 1.0
    """Epochs between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 0
    """Number of checkpoints with the best val/top1 to keep in addition; with the lowest training loss if there was no
    evaluation on val, as in pretraining."""
    keep_every_epochs: int | None = None
    """Epochs between two checkpoints that are kept permanently in addition; none if not set."""
    patience_s: float = 300.0
    """Seconds to retry a checkpoint that the storage refuses, while training continues, before the run fails."""

    def __post_init__(self) -> None:
        if not 0 < self.every_epochs < math.inf or self.keep < 1:
            raise UserError("every_epochs must be positive and keep at least 1; try 1 and 2")
        if self.keep_best < 0 or self.patience_s < 0:
            raise UserError("keep_best and patience_s must be at least 0; try 0 and 300")
        if self.keep_every_epochs is not None and self.keep_every_epochs < 1:
            raise UserError(f"keep_every_epochs {self.keep_every_epochs} is below 1; try 100, or leave it out")
