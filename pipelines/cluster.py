"""Context manager that connects to the Ray cluster of RAY_ADDRESS, or starts an embedded Ray on this machine.

Owns how Ray is started, configured and stopped.
"""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from pipelines.config import ComputeConfig
from pipelines.errors import CommandFailed
from pipelines.interrupts import (
    deferring_signals,
    handle_signals_again,
    interrupted_by,
    interrupted_in_place_of_errors,
    is_work_left,
)
from pipelines.machine import Machine, num_cores, this_machine
from pipelines.stages import stage

log = logging.getLogger(__name__)

_EMBEDDED = "MAE_RAY_EMBEDDED"
"""Set in the processes of an embedded Ray, which inherit the driver's environment."""

DATA_TASK_CPUS = 0.8
"""CPUs that a data task requests. It waits for storage about a fifth of its time; meanwhile another one decodes."""

DATA_TASK = "mae_data_task"
"""Ray resource that limits data tasks. An embedded Ray declares one more than may run at a time, so that two executions
of a feed do not start twice as many processes. A cluster may declare it too, to choose which nodes decode and how many
tasks each runs at a time."""

_STARTS = 3
"""Attempts to start an embedded Ray: it gives up after 30 s, which a machine under full load may exceed."""

_GPU_TYPE = "accelerator_type:"
"""Begin of the Ray resource that names a node's GPUs."""

_WITHOUT_BFLOAT16 = {"V100", "P100", "T4", "P4", "K80", "TITAN"}
"""Ray's names of GPUs before Ampere."""

# CPUs for the driver, trial drivers and Ray Data's split coordinators, in addition to workers and data tasks.
_SPARE_CPUS = 2


def ray_address() -> str:
    """Return the address of the cluster in use; empty if Ray is embedded."""
    return os.environ.get("RAY_ADDRESS", "")


def machine() -> Machine:
    """Describe what a command may use: the cluster if RAY_ADDRESS names one, otherwise this machine.

    Connects to the cluster for a moment unless this process is connected. Raises CommandFailed if it does not respond.
    """
    if not ray_address():
        return this_machine()
    with ray_session(None):
        return _cluster_machine(ray.cluster_resources())


def _cluster_machine(resources: Mapping[str, float]) -> Machine:
    gpus = sorted(name.removeprefix(_GPU_TYPE) for name in resources if name.startswith(_GPU_TYPE))
    num_gpus = int(resources.get("GPU", 0))
    return Machine(
        num_cores=max(1, int(resources.get("CPU", 1))),
        num_gpus=num_gpus,
        gpu=" and ".join(gpus) if num_gpus else "",
        has_bfloat16=num_gpus > 0 and not _WITHOUT_BFLOAT16 & set(gpus),
        is_cluster=True,
    )


def is_embedded() -> bool:
    """Return whether this process belongs to an embedded Ray."""
    return bool(os.environ.get(_EMBEDDED))


def task_limit() -> int | None:
    """Return how many tasks of a preparation may run at a time: as many as this machine has cores if Ray is embedded.

    None leaves the number to the cluster's free CPUs.
    """
    return num_cores() if is_embedded() else None


def task_slots() -> int:
    """Return how many tasks that request one CPU can run at a time."""
    limit = task_limit()
    if limit is None and ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return limit or num_cores()


class _Defaults(AbstractContextManager["_Defaults"]):
    """Variables of the environment that are set for a session of Ray, and not for what this process does after it."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def set(self, name: str, value: str) -> None:
        """Set the variable unless somebody has."""
        if name not in os.environ:
            os.environ[name] = value
            self._names.append(name)

    def __exit__(self, *error: object) -> None:
        for name in self._names:
            os.environ.pop(name, None)


@contextmanager
def ray_session(compute: ComputeConfig | None, groups: int = 1) -> Iterator[None]:
    """Connect to Ray, or start one with CPUs for `groups` worker groups and their data tasks; stop it at the end.

    Does nothing if Ray is initialized already. An embedded Ray declares as many logical CPUs as the work requests,
    whatever the machine has: two 1-CPU workers on a machine declared as two CPUs would leave Ray Data none, and the run
    would hang. For work without worker groups (`compute` is None), it declares the CPUs that this process may use.
    Raises CommandFailed if Ray does not respond.
    """
    if ray.is_initialized():
        yield
        return
    with _Defaults() as defaults:
        # Interval at which Train's controller polls its workers; each report() blocks for up to as long (default 2 s).
        defaults.set("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        defaults.set("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        defaults.set("RAY_DATA_LOG_LEVEL", "ERROR")
        # Ray prints the error of a result that nobody asks for; ours are all asked for. Ray Data reports statistics to
        # an actor that ends with the first trial of a sweep, and its successor does not know the others' datasets
        # (findings/ray_data_statistics_die_with_a_placement_group.sh).
        defaults.set("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        defaults.set("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # In Ray's processes; `_without_signal_handler` does it for this one.
        defaults.set("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        quiet_ray()
        # Spot instances give 30 s of notice; Train polls every 5 s by default.
        defaults.set("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        started: set[psutil.Process] = set()
        if ray_address():
            connect(logging_level=logging.WARNING)
        else:
            # This machine is not preempted with notice, and the watcher would be one more process to start.
            defaults.set("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # Ray runs workers at niceness 15; ours are the main workload, so use 0.
            defaults.set("RAY_worker_niceness", "0")
            # In place of Ray's C++ handler, say in which line of Python a worker crashed.
            defaults.set("PYTHONFAULTHANDLER", "1")
            # Nobody reads Ray's own metrics; without them an idle process takes 0.8 % of a core instead of 1.2 %.
            defaults.set("RAY_enable_metrics_collection", "0")
            defaults.set("RAY_event_stats", "0")
            # Ray expects fewer processes on a small machine than we start, and would warn each time.
            defaults.set("RAY_worker_maximum_startup_concurrency", str(max(8, num_cores())))
            # Ray gives up a worker that does not register within 60 s, and ray.init then waits for ever. At a low
            # priority on a busy machine workers take longer (seen on a sweep at niceness 19).
            defaults.set("RAY_worker_register_timeout_seconds", "600")
            os.environ[_EMBEDDED] = "1"
            started = connect(
                _STARTS,
                # Without it, Ray connects to a cluster that anybody has started on this machine by `ray start`.
                address="local",
                **_declared(compute, groups),
                include_dashboard=False,
                logging_level=logging.ERROR,
                # Applies to every process.
                logging_config=ray.LoggingConfig(log_level="ERROR"),
                object_store_memory=_object_store_bytes(),
            )
        try:
            yield
        finally:
            if not is_work_left():
                shut_down(started)
            os.environ.pop(_EMBEDDED, None)


def shut_down(started: set[psutil.Process]) -> None:
    """Disconnect from Ray, or end it with all that these processes of it started.

    Ray leaves its agents to notice that the raylet is gone, which takes them 10 s, and more on a busy machine.
    """
    with deferring_signals():
        family = [process for parent in started for process in (parent, *_descendants(parent))]
        ray.shutdown()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _declared(compute: ComputeConfig | None, groups: int) -> dict[str, Any]:
    """Return the logical CPUs and data tasks that an embedded Ray declares."""
    if compute is None:
        return {"num_cpus": num_cores()}
    compute = compute.fixed()
    return {
        "num_cpus": groups * (compute.num_workers + compute.data_tasks) + _SPARE_CPUS,
        "resources": {DATA_TASK: groups * (compute.data_tasks + 1)},
    }


def children_from_now() -> Callable[[], set[psutil.Process]]:
    """Return a function that returns the processes that this one has started since this call."""
    before = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - before


@contextmanager
def _unwarned_of_killed() -> Iterator[None]:
    """Hide a warning of Python: Ray waits for no process of a start that failed, and drops them with the error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
        yield


@_unwarned_of_killed()
def connect(starts: int = 1, **arguments: Any) -> set[psutil.Process]:
    """Initialize Ray, in at most `starts` attempts; return the processes that it has started.

    Raises CommandFailed if it does not respond, and Interrupted after a signal; none of its processes is left then.
    """
    started = children_from_now()

    for attempt in range(1, starts + 1):
        try:
            doing = f"connecting to Ray {ray_address()}" if ray_address() else "starting Ray"
            with interrupted_in_place_of_errors():
                with stage(doing), own_sessions(), _own_root_logger(), _without_signal_handler():
                    ray.init(**arguments)
                    handle_signals_again()
                return started()
        except SystemExit:  # raised by the handler that ray.init installs
            handle_signals_again()
            interrupted = interrupted_by(signal.SIGTERM)
            shut_down(started())
            raise interrupted from None
        except KeyboardInterrupt:
            handle_signals_again()
            shut_down(started())
            raise
        except Exception as error:  # ray.init also raises bare Exceptions
            cause = " ".join(str(error).split())
            shut_down(started())
            if attempt == starts:
                place = ray_address() or "on this machine"
                raise CommandFailed(f"Ray {place} did not answer ({cause}); run `mae doctor`, then rerun") from error
            log.warning("Ray did not start (%s); trying again", cause)
    raise AssertionError("an attempt returns or raises")


@contextmanager
def _without_signal_handler() -> Iterator[None]:
    """Start Ray in the block without its C++ handler of fatal signals, which takes SIGTERM too.

    It would print a stack and abort. Ray has read the variable of the environment when it was imported.
    """
    before = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = before


@contextmanager
def _own_root_logger() -> Iterator[None]:
    """Leave this process' root logger as it is.

    The LoggingConfig is meant for Ray's processes, but sets the level here too and adds a handler at each start:
    messages of other libraries would vanish or appear twice.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def own_sessions() -> Iterator[None]:
    """Give each process that Ray starts in the block a session of its own.

    Ctrl-C, and the SIGTERM of `timeout`, go to the command's process group. They are meant for the driver, and workers
    need to live until their checkpoint is written.
    """
    global _is_starting
    _is_starting = True
    try:
        yield
    finally:
        _is_starting = False


def _leave_session() -> None:
    if _is_starting:
        os.setsid()


_is_starting = False
os.register_at_fork(after_in_child=_leave_session)


def quiet_ray() -> None:
    """Limit the logs of Ray's libraries to errors: their warnings concern progress bars and defaults that we chose."""
    import ray.data  # noqa: F401  (the import sets its loggers up, so their levels are set after it)

    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _object_store_bytes() -> int:
    """Return the size of the object store, small enough that it does not spill to disk at start.

    The lesser of 20 % of the available memory and 80 % of the free /dev/shm; at least 128 MiB.
    """
    shm_bytes = psutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**31
    return int(max(128 * 2**20, min(psutil.virtual_memory().available * 0.2, shm_bytes * 0.8)))
