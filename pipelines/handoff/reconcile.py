"""Compare what should have been trained with what was, and start what is missing: each training once.

1. A training is finished if its run folder has an outcome, or if MLflow has a finished run of its name.
2. Its last attempt, if that has no end, is looked up; it may run, have ended, or never have started.
3. Otherwise the next attempt is claimed, by a file that only one reconciler can create, and started.

Trainings are taken in the order of the plan, and one that waits for its next attempt holds its place. So reconcilers
that look at the same time agree on which ones are the first `max_running`, and do not start more between them.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import HandoffPlan
from pipelines.handoff.executors import Executor, run_is_alive
from pipelines.handoff.jobs_file import Training, training_of
from pipelines.handoff.ledger import Claim, End, Ledger, Process, unended, wait_s
from pipelines.runs.folder import RunFolder
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

State = Literal["finished", "running", "retrying", "waiting", "failed", "stopped", "no version", "wrong"]
NEEDS_A_PERSON = ("failed", "stopped", "wrong")


@dataclass(frozen=True, kw_only=True)
class Status:
    """What became of one job for the version that has its alias now."""

    job: str
    state: State
    run: str = ""
    version: str = ""
    attempt: int = 0
    said: str = ""
    """Why it failed or waits, or the model version that it registered."""
    due_s: float | None = None
    """When it may be tried again, in Unix seconds."""

    @property
    def line(self) -> str:
        """One line for people."""
        about = [self.state, self.version, self.run, f"attempt {self.attempt}" if self.attempt else "", self.said]
        return f"{self.job}: {', '.join(filter(None, about))}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers of a plan."""

    max_running: int
    max_attempts: int
    retry_s: float

    @classmethod
    def of(cls, plan: HandoffPlan) -> "Limits":
        return cls(max_running=plan.max_running, max_attempts=plan.max_attempts, retry_s=plan.retry_s)


def wanted(plan: HandoffPlan, tracking: registry.Tracking) -> list[Training | Status]:
    """Return the training of each job for the version with its alias now; a status for a job that has none.

    Raises TrackingUnreachable if MLflow does not answer.
    """
    output = open_storage(plan.output).uri
    found: list[Training | Status] = []
    for job in plan.jobs:
        uri = f"models:/{job.model}@{job.alias}"
        try:
            ref = tracking.find_version(uri)
            if ref is None:
                found.append(Status(job=job.name, state="no version", said=f"nothing is {uri} yet"))
            else:
                found.append(training_of(job, output, ref))
        except registry.TrackingUnreachable:
            raise
        except (UserError, OSError) as error:
            # One job with a wrong dataset must not keep the others from being trained.
            found.append(Status(job=job.name, state="wrong", said=" ".join(str(error).split())))
    return found


def reconcile(
    trainings: Sequence[Training | Status],
    output: Storage,
    limits: Limits,
    executor: Executor,
    is_finished_in_mlflow: Callable[[Training], bool],
) -> list[Status]:
    """Start what is missing and may run now; return the status of each training, in order."""
    current = {training.name for training in trainings if isinstance(training, Training)}
    num_running = sum(_still_runs(Ledger(output, name), executor) for name in unended(output) if name not in current)
    statuses: list[Status] = []
    for training in trainings:
        if isinstance(training, Status):
            statuses.append(training)
            continue
        may_start = num_running < limits.max_running
        status = _advance(training, output, limits, executor, is_finished_in_mlflow, may_start=may_start)
        num_running += status.state in ("running", "retrying")
        statuses.append(status)
    return statuses


def forgive(trainings: Sequence[Training | Status], output: Storage, jobs: Sequence[str]) -> None:
    """Let the jobs be tried again, however often they failed. Raises UserError if the plan has no such job."""
    known = {training.job for training in trainings}
    for job in jobs:
        if job not in known:
            raise UserError(f"there is no job {job!r} to retry; the plan has {', '.join(sorted(known))}")
    for training in trainings:
        if isinstance(training, Training) and training.job in jobs:
            Ledger(output, training.name).forgive()


def _still_runs(ledger: Ledger, executor: Executor) -> bool:
    """Return whether the last attempt for an earlier version, dataset or config still runs."""
    number, now_s = ledger.last(), time.time()
    runs = executor.is_running(ledger, number, ledger.claimed(number), now_s)
    if runs is None:
        ledger.end(number, End(status=None, said="it was never started", time_s=now_s, kind="never began"))
    return bool(runs)


def _advance(
    training: Training,
    output: Storage,
    limits: Limits,
    executor: Executor,
    is_finished_in_mlflow: Callable[[Training], bool],
    *,
    may_start: bool,
) -> Status:
    """Take the next step of one training; return its status."""
    ledger, now_s = Ledger(output, training.name), time.time()

    def status(state: State, said: str = "", number: int = 0, due_s: float | None = None) -> Status:
        about = {"job": training.job, "run": training.name, "version": training.version}
        return Status(state=state, said=said, attempt=number, due_s=due_s, **about)

    number = ledger.last()
    if number and not ledger.ended(number):
        claim = dataclasses.replace(ledger.claimed(number), words=training.words)
        runs = executor.is_running(ledger, number, claim, now_s)
        if runs is None and may_start:
            executor.start(ledger, number, claim)
        if runs or (runs is None and may_start):
            return status("running", number=number)
        if runs is None:
            return status("waiting", number=number)
    # Only now, since it may have finished since.
    outcome = RunFolder(output.join(training.name)).read_outcome()
    if outcome is not None:
        return status("finished", str(outcome.get("model", "")), number)
    if is_finished_in_mlflow(training):
        return status("finished", "its run folder is gone", number)
    failures = ledger.failures()
    if failures and failures[-1].kind == "stopped":
        return status("stopped", f"a person stopped it; start it again with --retry {training.job}", number)
    if len(failures) >= limits.max_attempts:
        return status("failed", f"{_said(failures[-1])}; after the cause is gone: --retry {training.job}", number)
    if failures and now_s < (due_s := failures[-1].time_s + wait_s(failures, limits.retry_s)):
        return status("retrying", f"in {due_s - now_s:.0f} s, since {_said(failures[-1])}", number, due_s)
    if not may_start or run_is_alive(ledger, now_s):
        said = "" if not may_start else "another driver holds its run"
        return status("waiting", said, number)
    claim = Claim(where=executor.where, words=training.words, by=Process.this(), time_s=now_s)
    if ledger.claim(number + 1, claim):
        executor.start(ledger, number + 1, claim)
    # Otherwise another reconciler has claimed it, and starts it.
    return status("running", number=number + 1)


def _said(end: End) -> str:
    return f"status {end.status}: {end.said}" if end.status is not None else end.said


def summary(statuses: Sequence[Status]) -> dict[str, Any]:
    """Return what `mae handoff` prints; it fails if a job needs a person."""
    return {
        "jobs": [asdict(status) for status in statuses],
        "ok": not any(status.state in NEEDS_A_PERSON for status in statuses),
        "text": "\n".join(status.line for status in statuses),
    }
