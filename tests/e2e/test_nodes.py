"""Nodes come and go while a run goes on: one that is announced to go, one that goes unannounced, a new one, a dead GCS.

Several raylets on this machine (ray.cluster_utils); the driver is a process of its own, without MLflow.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from pipelines.config import PretrainConfig, from_dict, to_dict
from pipelines.dataset.manifest import read_manifest
from pipelines.drivers.pretrain import pixels_of
from pipelines.runs.jobs import PretrainJob
from pipelines.storage import open_storage
from pipelines.worker.recorder import PREEMPTION_CHECK_STEPS
from tests.e2e.driving import STEPS_PER_EPOCH, Place, coordinators, exit_status, ranks, started, wait_for, wait_for_step
from tests.waiting import let_pass

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray's own, of the raylets that it starts and we remove.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

DRIVER = """
import json, sys
from pipelines.cluster import ray_session
from pipelines.config import from_dict
from pipelines.dataset.manifest import read_manifest
from pipelines.drivers.launch import launch
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.plans import index_dataset
from pipelines.storage import open_storage
job = from_dict(PretrainJob, json.loads(sys.argv[1]))
dataset = index_dataset(job, read_manifest(open_storage(job.config.data.uri)))
with ray_session(job.config.compute):
    launch([(job, dataset)], "nodes")
"""
GRACE_S = 6.0
ELASTIC = {"compute": {"num_workers": 2, "min_workers": 1, "spread": True}, "checkpoint": {"every_epochs": 1}}


@contextlib.contextmanager
def cluster_of(nodes: int, num_cpus: int, place: Place) -> Iterator[Any]:
    """Run a head without CPUs and several nodes with CPUs, in the environment of the place."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for key, value in place.environment.items():
            patch.setenv(key, value)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        # Train asks a dashboard whether its controller lives; we have none, and that of another Ray would say no.
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=num_cpus)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


def driving(place: Place, name: str, cluster: Any, **changes: Any) -> contextlib.AbstractContextManager[psutil.Process]:
    """Return a context in which the driver of a run on the cluster runs."""
    config = from_dict(PretrainConfig, place.config(name, **changes))
    pixels = pixels_of(read_manifest(open_storage(str(place.dataset))), 1)
    job = PretrainJob(folder=str(place.folder / "runs" / name), config=config, pixels=pixels)
    there = Place.of(place.folder, place.dataset, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled")
    return started([sys.executable, "-c", DRIVER, json.dumps(to_dict(job))], there)


def nodes_of_ranks(cluster: Any) -> list[Any]:
    """Return the nodes on which a worker trains."""
    return [node for node in cluster.worker_nodes if ranks(raylet_of(node))]


def node_of_a_rank(cluster: Any) -> Any:
    """Return a node on which a worker trains."""
    found = nodes_of_ranks(cluster)
    assert found, "no node has a worker"
    return found[0]


def raylet_of(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def announce(cluster: Any, node: Any, in_s: float) -> None:
    """Announce to Ray that the node will be preempted after that many seconds."""
    # Both modules are built and have no stubs.
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + in_s))
    accepted, said = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "", deadline_ms)
    assert accepted, said


def resumed(place: Place, name: str) -> list[tuple[int, int]]:
    """(step, workers) of every group that went on with the run."""
    found = re.findall(rf"resuming \S+/{name} at step (\d+) with (\d+) workers", place.log)
    return [(int(step), int(workers)) for step, workers in found]


@pytest.mark.long
def test_a_node_that_is_announced_to_go_costs_no_more_than_ten_steps_and_changes_nothing(place: Place) -> None:
    # Nothing but the announcement leads to a checkpoint before the end.
    one = {"epochs": 80, "compute": {"num_workers": 1, "max_failures": 0}, "checkpoint": {"every_epochs": 80}}
    with cluster_of(2, 1, place) as cluster:
        with driving(place, "calm", cluster, **one) as driver:
            assert exit_status(driver) == 0, place.log
        with driving(place, "drained", cluster, **one) as driver:
            wait_for(lambda: place.losses("drained"), "the first loss", place, driver)
            leaving = node_of_a_rank(cluster)
            announce(cluster, leaving, GRACE_S)
            let_pass(GRACE_S)
            reached = max(place.losses("drained"))
            cluster.remove_node(leaving, allow_graceful=False)
            assert exit_status(driver) == 0, place.log
    ((step, workers),) = resumed(place, "drained")
    assert workers == 1
    assert 0 < step < 80 * STEPS_PER_EPOCH
    assert step % PREEMPTION_CHECK_STEPS == 0
    assert reached - step <= PREEMPTION_CHECK_STEPS
    assert place.run_folder("drained").read_failures() == [], "an announced end is no failure"
    assert place.losses("drained") == place.losses("calm")
    assert place.weights("drained") == place.weights("calm")


@pytest.mark.long
def test_a_node_gone_without_a_word_and_a_dead_gcs_change_nothing(place: Place) -> None:
    two = {"epochs": 60, "compute": {"num_workers": 2, "spread": True, "max_failures": 1}}
    undisturbed = place.run(place.command("undisturbed", **two))
    assert undisturbed.returncode == 0, undisturbed.stderr
    with cluster_of(3, 2, place) as cluster, driving(place, "lost", cluster, **two) as driver:
        wait_for_step(place, "lost", 18, driver)
        cluster.remove_node(node_of_a_rank(cluster), allow_graceful=False)
        lost_at = place.newest("lost")
        wait_for_step(place, "lost", lost_at + 18, driver)
        assert len(place.run_folder("lost").read_failures()) == 1
        cluster.head_node.kill_gcs_server()
        # Ray's processes give up a minute later; a run may come to its end before, and then that is its end.
        status = exit_status(driver)
        assert (status == 0) == (place.run_folder("lost").read_result() is not None), place.log
    headless_at = place.newest("lost")
    with cluster_of(2, 2, place) as cluster, driving(place, "lost", cluster, **two) as driver:
        assert exit_status(driver) == 0, place.log
    first, *more = (step for step, _ in resumed(place, "lost"))
    assert first >= lost_at
    assert more == ([] if status == 0 else [headless_at])
    assert place.losses("lost") == place.losses("undisturbed")
    assert place.weights("lost") == place.weights("undisturbed")


@pytest.mark.long
def test_a_feed_on_each_of_four_nodes_gives_what_one_node_gets_and_a_dead_coordinator_changes_nothing(
    place: Place,
) -> None:
    four = {"epochs": 40, "compute": {"num_workers": 4, "spread": True, "max_failures": 1}, "data": {"lanes": 4}}
    undisturbed = place.run(place.command("one-node", **four))
    assert undisturbed.returncode == 0, undisturbed.stderr
    with cluster_of(4, 2, place) as cluster, driving(place, "four-nodes", cluster, **four) as driver:
        wait_for_step(place, "four-nodes", 18, driver)
        raylets = [raylet_of(node) for node in nodes_of_ranks(cluster)]
        assert len(raylets) == 4
        feeding = [coordinators(raylet) for raylet in raylets]
        assert all(feeding), "every node should have a coordinator"
        feeding[-1][0].kill()
        assert exit_status(driver) == 0, place.log
    assert len(place.run_folder("four-nodes").read_failures()) == 1
    assert place.losses("four-nodes") == place.losses("one-node")
    assert place.weights("four-nodes") == place.weights("one-node")


@pytest.mark.long
def test_a_run_goes_on_with_the_nodes_that_there_are(place: Place) -> None:
    """Two workers, one after an announced end, two when a node comes, one when it goes without a word."""
    long = ELASTIC | {"epochs": 400}
    with cluster_of(2, 1, place) as cluster, driving(place, "moving", cluster, **long) as driver:
        wait_for_step(place, "moving", 18, driver)
        leaving = node_of_a_rank(cluster)
        announce(cluster, leaving, GRACE_S)
        let_pass(GRACE_S)
        cluster.remove_node(leaving, allow_graceful=False)
        wait_for_step(place, "moving", place.newest("moving") + 18, driver)
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        wait_for(lambda: len(resumed(place, "moving")) >= 2, "the larger group", place, driver)
        wait_for_step(place, "moving", place.newest("moving") + 18, driver)
        cluster.remove_node(node_of_a_rank(cluster), allow_graceful=False)
        assert exit_status(driver) == 0, place.log
    assert [workers for _, workers in resumed(place, "moving")] == [1, 2, 1]
    assert sorted(place.losses("moving")) == list(range(1, 400 * STEPS_PER_EPOCH + 1))
