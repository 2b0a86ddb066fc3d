"""`mae handoff`: look once, or again and again, at what should have been trained, and start what is missing."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import HandoffConfig, HandoffPlan
from pipelines.handoff.executors import Executor, Here, OnRay
from pipelines.handoff.jobs_file import config_of, read_plan
from pipelines.handoff.reconcile import Limits, Status, forgive, reconcile, summary, wanted
from pipelines.handoff.webhook import listening, read_secret
from pipelines.interrupts import Interrupted
from pipelines.jobs import job_server_address, open_job_server
from pipelines.storage import open_storage

log = logging.getLogger(__name__)


def handoff(config: HandoffConfig) -> dict[str, Any]:
    """Start the trainings that are missing; return the status of each job.

    Through a job server, one pass submits what may run and returns. On this machine it waits for the trainings that it
    started, and starts others as they end. Raises UserError for a wrong file or a service that does not answer, and
    Interrupted after a signal, when its trainings on this machine have stopped in order.
    """
    plan = read_plan(config.jobs)
    address, wake = job_server_address(config.address), threading.Event()
    registry.refuse_local_tracking(address)
    here = None if address else Here(wake)
    with ExitStack() as stack:
        if config.webhook_port is not None:
            port = stack.enter_context(listening(config.webhook_port, read_secret(), wake))
            log.info("listening for webhooks at http://127.0.0.1:%d", port)
        try:
            executor: Executor = here or OnRay(open_job_server(address))
            forgiven = list(config.retry)
            return (
                _watch(config, plan, executor, wake, forgiven)
                if config.watch
                else _pass(plan, executor, wake, forgiven)
            )
        except KeyboardInterrupt:
            stopped = here.stop() if here else 0
            also = f", with {stopped} trainings in order" if stopped else "" if here else "; submitted jobs continue"
            raise Interrupted(f"stopped{also}") from None
        except BaseException:
            if here:
                here.stop()
            raise


def look(plan: HandoffPlan, executor: Executor, forgiven: Sequence[str] = ()) -> list[Status]:
    """Compare once and start what may run. Raises UserError if MLflow or the job server does not answer."""
    tracking = registry.open_tracking(config_of(plan.jobs[0]).tracking.experiment)
    trainings, output = wanted(plan, tracking), open_storage(plan.output)
    forgive(trainings, output, forgiven)

    def is_finished(training: Any) -> bool:
        return tracking.has_finished(training.experiment, training.name)

    return reconcile(trainings, output, Limits.of(plan), executor, is_finished)


def _pass(plan: HandoffPlan, executor: Executor, wake: threading.Event, forgiven: list[str]) -> dict[str, Any]:
    """Look until nothing that this pass started is running."""
    shown: list[Status] = []
    while True:
        wake.clear()
        statuses = look(plan, executor, forgiven)
        forgiven = []
        _say_changes(shown, statuses)
        shown = statuses
        if not (isinstance(executor, Here) and executor.num_children):
            return summary(statuses)
        wake.wait()


def _watch(
    config: HandoffConfig, plan: HandoffPlan, executor: Executor, wake: threading.Event, forgiven: list[str]
) -> dict[str, Any]:
    """Look again every `every_s`, when an attempt is due, when one ends and when a webhook arrives, until a signal."""
    shown: list[Status] = []
    while True:
        wake.clear()
        next_s = config.every_s
        try:
            # Read again: it may be a ConfigMap that has changed.
            plan = read_plan(config.jobs)
            statuses = look(plan, executor, forgiven)
            forgiven = []
            _say_changes(shown, statuses)
            shown = statuses
            due = [status.due_s - time.time() for status in statuses if status.due_s is not None]
            next_s = max(0.0, min([next_s, *due]))
        except (UserError, OSError) as error:
            log.warning("looking again in %g s: %s", next_s, " ".join(str(error).split()))
        wake.wait(next_s)


def _say_changes(before: Sequence[Status], now: Sequence[Status]) -> None:
    known = {(status.job, status.state, status.attempt) for status in before}
    for status in now:
        if (status.job, status.state, status.attempt) not in known:
            log.info("%s", status.line)
