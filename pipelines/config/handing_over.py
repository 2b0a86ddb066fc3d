"""Options of handing model versions over to fine-tuning jobs, and of jobs on a cluster."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_core.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,59}")
_ALIAS = re.compile(r"[\w-]+")
_DECIDED = ("backbone", "output", "name", "extend", "tracking.tags")


@dataclass(frozen=True, kw_only=True)
class HandoffJob:
    """One training that every version with the alias gets."""

    name: str
    """Name of the job, which begins the names of its runs: letters, digits and -."""
    model: str
    """Registered backbone, without alias, such as mae-vit_base_patch16."""
    alias: str = "champion"
    """Alias of the version to train from."""
    command: Literal["finetune", "probe"] = "finetune"
    """finetune registers a classifier; probe measures only."""
    preset: str = ""
    """Preset of the command, or a YAML file beside this one; empty for the command's defaults."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the command that replace the preset's, such as data.uri: s3://bucket/flowers."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"job name {self.name!r} is not of letters a-z, digits and - (at most 60); try flowers-vit-b"
            )
        if not self.model or set(self.model) & set("/:@"):
            raise UserError(f"model {self.model!r} of job {self.name} is no registered name; try mae-vit_base_patch16")
        if not _ALIAS.fullmatch(self.alias):
            raise UserError(f"alias {self.alias!r} of job {self.name} is none; try champion")
        decided = [name for name in _DECIDED if name in self.options]
        if decided:
            raise UserError(f"job {self.name} sets {decided[0]}, which the hand-over decides; leave it out of options")


@dataclass(frozen=True, kw_only=True)
class HandoffPlan:
    """What `mae handoff --jobs FILE` reads."""

    output: str
    """Folder or s3:// prefix of the run folders. What was started is recorded below it, in .handoff/."""
    jobs: tuple[HandoffJob, ...]
    """The trainings, in order of precedence."""
    max_running: int = 1
    """Trainings at a time. One that waits for its next attempt counts, so that two reconcilers agree."""
    max_attempts: int = 3
    """Failures after which a training is given up until `mae handoff --retry NAME`."""
    retry_s: float = 60.0
    """Seconds from a failure to the next attempt, doubled with each further failure, at most an hour."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 1")
        if not 0 <= self.retry_s < 86_400:
            raise UserError(f"retry_s {self.retry_s:g} is not between 0 and a day; try 60")
        if not self.output.strip():
            raise UserError("output is empty; try s3://bucket/runs")
        names = [job.name for job in self.jobs]
        if not names:
            raise UserError("there are no jobs; list at least one with name, model and options")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"job {twice[0]} is listed twice; rename one")


@dataclass(frozen=True, kw_only=True)
class HandoffConfig:
    """Start the trainings that each version with an alias has not had yet, each exactly once."""

    jobs: str = "handoff.yaml"
    """YAML file with the jobs."""
    address: str = ""
    """Ray's job server, such as http://ray-head:8265; if empty, RAY_API_SERVER_ADDRESS or RAY_ADDRESS. Without any,
    trainings run on this machine."""
    watch: bool = False
    """Run until a signal, and look again every `every_s`; otherwise look once."""
    every_s: float = 60.0
    """Seconds between two looks with --watch."""
    webhook_port: int | None = None
    """Port on loopback where MLflow's webhooks end the wait early, signed with the secret in MAE_WEBHOOK_SECRET or in
    the file MAE_WEBHOOK_SECRET_FILE."""
    retry: tuple[str, ...] = ()
    """Jobs to start again although they were given up or stopped."""

    def __post_init__(self) -> None:
        if not 0 < self.every_s <= 86_400:
            raise UserError(f"every_s {self.every_s:g} is not above 0 and at most a day; try 60")
        if self.webhook_port is not None and not self.watch:
            raise UserError("webhook_port is for --watch; add it, or leave the port out")
        if self.webhook_port is not None and not 0 <= self.webhook_port < 65_536:
            raise UserError(f"webhook_port {self.webhook_port} is no port; try 8080")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """A command on a cluster, run from a copy of a folder."""

    address: str = ""
    """Ray's job server, such as http://ray-head:8265; if empty, RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    working_dir: str = "."
    """Folder that is packed and becomes the command's working directory, at most 512 MiB without what .gitignore and
    .rayignore name; '' for none."""
    exclude: tuple[str, ...] = (".git", ".venv", "mae-mlflow", "runs")
    """Further patterns, as in .gitignore, that are left out."""
    env: tuple[str, ...] = ()
    """Variables NAME=VALUE of the command. They are visible to whoever may read the cluster's jobs: no secrets."""
    id: str = ""
    """Submission id, which a cluster takes once; if empty, Ray chooses one."""
    detach: bool = False
    """Print the id and do not follow the log."""

    def __post_init__(self) -> None:
        for pair in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
                raise UserError(f"env {pair!r} is not NAME=VALUE; try --env OMP_NUM_THREADS=1")


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """The jobs of a cluster."""

    address: str = ""
    """Ray's job server, such as http://ray-head:8265; if empty, RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    follow: str = ""
    """Follow the log of the job with this id until it ends, and exit with its status."""
    stop: str = ""
    """Stop the job with this id in order."""

    def __post_init__(self) -> None:
        if self.follow and self.stop:
            raise UserError("follow and stop are both given; give one of them")
