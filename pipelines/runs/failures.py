"""Why a worker group ended before its time: in the log, in the run's folder, and in the error that ends the run."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from pipelines.console import speak_up
from pipelines.runs.folder import RunFolder

log = logging.getLogger(__name__)

_MEMORY = re.compile(r"MemoryError|bad_alloc|out of memory|can't allocate memory|low on memory", re.IGNORECASE)
# What the ranks that live say of one that died.
_OF_OTHERS = re.compile(r"gloo|NCCL|Connection (closed|reset)|remote process exited|Broken pipe", re.IGNORECASE)


def cause_of(failures: Mapping[int, BaseException]) -> str:
    """What the most telling of these ranks failed of, in words: memory first, what the others noticed of it last."""
    words = {rank: _words(rank, error) for rank, error in failures.items()}
    return words[min(words, key=lambda rank: (_weight(failures[rank]), rank))]


def _weight(error: BaseException) -> int:
    said = f"{type(error).__name__}: {error}"
    inner = getattr(error, "health_check_failure", None)
    if _MEMORY.search(said) and inner is None:
        return 0
    return 2 if inner is None and _OF_OTHERS.search(said) else 1


def _words(rank: int, error: BaseException) -> str:
    said = str(error).strip()
    last = said.splitlines()[-1] if said else type(error).__name__
    if hasattr(error, "health_check_failure"):
        if "node" in said and "died because its node" in said:
            return f"the node of rank {rank} is gone"
        if "low on memory" in said:
            return f"rank {rank} was killed by Ray since its node ran low on memory; try a smaller data.micro_batch"
        return (
            f"the process of rank {rank} died without a word: killed, perhaps for its memory (its node's dmesg tells), "
            "or crashed"
        )
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return f"rank {rank} did not answer for compute.stall_s"
    if _MEMORY.search(f"{type(error).__name__}: {said}"):
        # Torch says it first and where in its own code last.
        line = next((line for line in said.splitlines() if _MEMORY.search(line)), last)
        return f"rank {rank} ran out of memory ({line}); try a smaller data.micro_batch"
    if _OF_OTHERS.search(last):
        return f"rank {rank} lost another rank, whose process or node is gone or stands still ({last})"
    return f"rank {rank} failed: {last}"


def is_preemption(failures: Mapping[int, BaseException]) -> bool:
    """A rank died with a node whose end had been announced, which counts as no failure."""
    inner = (getattr(error, "health_check_failure", error) for error in failures.values())
    return any(getattr(error, "preempted", False) for error in inner)


def witness(folders: list[str], allowed: int) -> Any:
    """A callback for Ray Train's controller: each failure of the group is told, counted, and kept in the folder of the
    first of these runs that is unfinished."""
    from ray.train import UserCallback

    class Witness(UserCallback):
        count = 0

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            if is_preemption(worker_exceptions):
                return
            speak_up()
            self.count += 1
            cause = cause_of(worker_exceptions)
            log.warning("failure %d (%d allowed): %s", self.count, allowed, cause)
            try:
                unfinished = (run for run in map(RunFolder, folders) if run.read_result() is None)
                if run := next(unfinished, None):
                    run.add_failure(cause)
            except OSError as error:  # Ray catches nothing of a callback's, and the run can go on without
                log.warning("the failure is not kept in the run's folder: %s", error)

    return Witness()
