"""Ray is there while the block runs: a cluster where RAY_ADDRESS is set, otherwise one inside this process."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as cluster_state

from pipelines.config import ComputeConfig
from pipelines.errors import CommandFailed

_EMBEDDED = "MAE_RAY_EMBEDDED"
"""Set in the processes of an embedded Ray, which inherit the driver's environment."""

DATA_TASK_CPUS = 0.8
"""What a data task asks for: it waits for storage for about a fifth of its time, in which another one decodes."""

DATA_TASK = "mae_data_task"
"""Resource of an embedded Ray, for one data task more than may run at a time: two executions of a feed must not need
twice as many processes. A cluster may declare it, too, to say which nodes decode, and how many tasks at a time."""

# CPUs for the driver, trial drivers and Ray Data's split coordinators, beside workers and decoding.
_SPARE_CPUS = 2


def ray_address() -> str:
    """Address of the cluster in use; empty where Ray is embedded."""
    return os.environ.get("RAY_ADDRESS", "")


def data_tasks(compute: ComputeConfig, worker_nodes: Sequence[str]) -> tuple[int | None, float]:
    """How many data tasks may run at a time beside workers on these nodes, None where free CPUs decide; and the CPUs
    that each asks for.

    Each is a process that takes seconds to start, so an embedded Ray starts no more than were asked for. Where workers
    hold every CPU, as a group that moved to fewer nodes may, tasks ask for none: they would wait for ever.
    """
    if not _has_free_cpu(worker_nodes):
        return compute.data_tasks, 0
    return compute.data_tasks if os.environ.get(_EMBEDDED) else None, DATA_TASK_CPUS


def _has_free_cpu(worker_nodes: Sequence[str]) -> bool:
    """A node that will stay has a CPU beside those of the workers."""
    leaving = cluster_state.get_draining_nodes()
    return any(
        node["Resources"].get("CPU", 0) - worker_nodes.count(node["NodeID"]) >= 1
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    )


@contextmanager
def ray_session(compute: ComputeConfig, groups: int = 1) -> Iterator[None]:
    """Ray runs, with CPUs enough for `groups` worker groups and their data tasks; an embedded Ray stops at the end.

    Two 1-CPU workers on a machine declared as two CPUs leave Ray Data nothing, and the run stands still: so an
    embedded Ray declares logical CPUs by what is asked of it, not by what the machine has.
    """
    if ray.is_initialized():
        yield
        return
    # Train's controller asks its workers this often; the default of 2 s makes every report() block for as long.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet_ray()
    # Spot instances give warnings of 30 s; Train would look every 5 s.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    if ray_address():
        _init(logging_level=logging.WARNING)
    else:
        # No one takes this machine away with notice, and the watcher is one process more to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Train asks the state API each second whether its controller lives. We have no dashboard to answer, and any
        # other Ray of this machine would answer that there is no such actor: the worker group would be removed.
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        # Ray lets its workers stand back for whatever else this machine does; here they are what it is to do.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # No one reads what its processes would measure of themselves: 1.2 % of a core each while they wait, then 0.8.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_event_stats", "0")
        # A few small processes are many times what Ray expects of a small machine, and it would say so each time.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        os.environ[_EMBEDDED] = "1"
        _init(
            num_cpus=groups * (compute.num_workers + compute.data_tasks) + _SPARE_CPUS,
            resources={DATA_TASK: groups * (compute.data_tasks + 1)},
            include_dashboard=False,
            logging_level=logging.ERROR,
            # In every process: Train's placement group cleaner warns each second that there is no dashboard.
            logging_config=ray.LoggingConfig(log_level="ERROR"),
            object_store_memory=_object_store_bytes(),
        )
    try:
        yield
    finally:
        ray.shutdown()
        os.environ.pop(_EMBEDDED, None)


def _init(**arguments: Any) -> None:
    """Ray is there. Raises CommandFailed where it does not come."""
    try:
        ray.init(**arguments)
    except Exception as error:  # ray.init raises bare Exceptions, too
        place = ray_address() or "on this machine"
        raise CommandFailed(
            f"Ray {place} did not answer ({' '.join(str(error).split())}); see `mae doctor`, and try again"
        ) from error


def quiet_ray() -> None:
    """Ray's own libraries log errors only: their warnings are about progress bars and defaults that we chose."""
    import ray.data  # noqa: F401  (sets its loggers up when it is imported, so they are turned down after that)

    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _object_store_bytes() -> int:
    """A fifth of memory or of /dev/shm, whichever is less, so that no spill to disk is provoked at start."""
    import psutil

    shm_bytes = psutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**31
    return int(max(128 * 2**20, min(psutil.virtual_memory().available * 0.2, shm_bytes * 0.8)))
