"""How many data tasks a worker group may run on each node, and what each requests of Ray."""

from collections.abc import Sequence

import ray
from ray._private.state import state as cluster_state

from pipelines.cluster import DATA_TASK, DATA_TASK_CPUS, is_embedded
from pipelines.config import FixedCompute


def data_tasks(compute: FixedCompute, worker_nodes: Sequence[str]) -> dict[str, tuple[int | None, float]]:
    """Return the limit of concurrent data tasks and the CPUs that each requests, for each node with workers.

    `worker_nodes` has the node id of each worker. A limit of None leaves the number to the cluster's free CPUs. An
    embedded Ray starts no more tasks than `compute.data_tasks`, since each is a process that takes seconds to start.
    With several nodes, each has as many tasks as fit on it beside its workers, and an equal share of those that fit on
    nodes without workers. The sum fits, since the tasks of a feed wait for its ranks, and these for the ranks of all
    others. Tasks request 0 CPUs

    - if a feed would have none, as after a move to fewer nodes: they would otherwise wait forever;
    - if another group has several nodes, too: they might wait for its tasks, whose ranks wait for a task of its own;
    - if workers are on all of several nodes. The limit suffices there, and Ray Data would leave an execution no CPU of
      a node that has fewer CPUs than the cluster has executions.
    """
    nodes, fits = sorted(set(worker_nodes)), _fitting_tasks(worker_nodes)
    share = sum(count for node, count in fits.items() if node not in nodes) // len(nodes)
    limits: dict[str, int | None] = {node: fits.get(node, 0) + share for node in nodes}
    if not all(limits.values()) or (len(nodes) > 1 and _is_another_group_spread()):
        return dict.fromkeys(nodes, (compute.data_tasks, 0))
    if is_embedded():
        limits = dict.fromkeys(nodes, compute.data_tasks)
    elif len(nodes) == 1:
        limits = {nodes[0]: None}
    num_cpus = DATA_TASK_CPUS if len(nodes) == 1 or share else 0
    return {node: (limit, num_cpus) for node, limit in limits.items()}


def _is_another_group_spread() -> bool:
    """Return whether a worker group other than that of this worker has several nodes."""
    ours = ray.util.get_current_placement_group()
    return any(
        group["state"] != "REMOVED" and len(set(group["bundles_to_node_id"].values())) > 1
        for id, group in ray.util.placement_group_table().items()
        if ours is None or id != ours.id.hex()
    )


def _fitting_tasks(worker_nodes: Sequence[str]) -> dict[str, int]:
    """Count the data tasks that fit beside the workers on every node that is alive and not being drained."""
    leaving = cluster_state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    free = {node["NodeID"]: node["Resources"].get("CPU", 0) - worker_nodes.count(node["NodeID"]) for node in nodes}
    fits = {node: max(0, int(num_cpus / DATA_TASK_CPUS)) for node, num_cpus in free.items()}
    declared = {node["NodeID"]: int(node["Resources"].get(DATA_TASK, 0)) for node in nodes}
    return {node: min(fits[node], declared[node]) for node in fits} if any(declared.values()) else fits
