"""Find the root cause of a worker group's failure; log it and record it in the run folder."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from pipelines.console import log_to_driver
from pipelines.runs.folder import RunFolder

log = logging.getLogger(__name__)

_MEMORY = re.compile(r"MemoryError|bad_alloc|out of memory|can't allocate memory|low on memory", re.IGNORECASE)
# Secondary errors, reported by surviving ranks.
_SECONDARY = re.compile(r"gloo|NCCL|Connection (closed|reset)|remote process exited|Broken pipe", re.IGNORECASE)


def cause_of(failures: Mapping[int, BaseException]) -> str:
    """Describe the most likely root cause among the errors of these ranks.

    Memory errors come first, then other errors, then what surviving ranks report of a dead one.
    """
    rank = min(failures, key=lambda rank: (_priority(failures[rank]), rank))
    return _description(rank, failures[rank])


def _priority(error: BaseException) -> int:
    """Return 0 for a memory error, 1 for any other, 2 for a secondary one."""
    text = f"{type(error).__name__}: {error}"
    inner = getattr(error, "health_check_failure", None)
    if _MEMORY.search(text) and inner is None:
        return 0
    return 2 if inner is None and _SECONDARY.search(text) else 1


def _description(rank: int, error: BaseException) -> str:
    text = str(error).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    if hasattr(error, "health_check_failure"):
        if "died because its node" in text:
            return f"the node of rank {rank} died"
        if "low on memory" in text:
            return f"Ray killed rank {rank} because its node ran low on memory; try a smaller data.micro_batch"
        return (
            f"the process of rank {rank} died without an error: it crashed or was killed, perhaps for its memory use "
            "(see dmesg on its node)"
        )
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return f"rank {rank} did not answer for compute.stall_s"
    if _MEMORY.search(f"{type(error).__name__}: {text}"):
        # In torch's message the cause is the first line; the last one is a stack frame.
        line = next((line for line in text.splitlines() if _MEMORY.search(line)), last)
        return f"rank {rank} ran out of memory ({line}); try a smaller data.micro_batch"
    if _SECONDARY.search(last):
        return f"rank {rank} lost another rank, whose process or node died or hangs ({last})"
    return f"rank {rank} failed: {last}"


def is_preemption(failures: Mapping[int, BaseException]) -> bool:
    """Return whether a rank died with a node whose preemption was announced, which counts as no failure."""
    inner = (getattr(error, "health_check_failure", error) for error in failures.values())
    return any(getattr(error, "preempted", False) for error in inner)


def failure_recorder(folders: list[str], allowed: int) -> Any:
    """Return a callback for Ray Train's controller that logs and counts each failure of the group.

    It also records the cause in the folder of the first unfinished of these runs. `allowed` is the limit that it logs.
    """
    from ray.train import UserCallback

    class FailureRecorder(UserCallback):
        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            if is_preemption(worker_exceptions):
                return
            log_to_driver()
            self.count += 1
            cause = cause_of(worker_exceptions)
            log.warning("failure %d (%d allowed): %s", self.count, allowed, cause)
            try:
                unfinished = (run for run in map(RunFolder, folders) if run.read_result() is None)
                if run := next(unfinished, None):
                    run.add_failure(cause)
            except OSError as error:  # Ray does not catch a callback's errors, and the run does not need the record.
                log.warning("could not record the failure in the run folder: %s", error)

    return FailureRecorder()
