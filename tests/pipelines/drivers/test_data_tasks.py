"""What data tasks may request of a cluster."""

from typing import Any

import pytest
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from pipelines.config import FixedCompute
from pipelines.drivers.data_tasks import data_tasks

MODULE = data_tasks.__module__


def node(name: str, num_cpus: float, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": num_cpus} if num_cpus else {}}


@pytest.mark.parametrize(
    ("nodes", "workers", "leaving", "wanted"),
    [
        ([node("head", 0), node("a", 2)], ["a", "a"], [], {"a": (2, 0)}),
        ([node("a", 2), node("b", 8)], ["a", "a"], ["b"], {"a": (2, 0)}),
        ([node("a", 2), node("b", 8, alive=False)], ["a", "a"], [], {"a": (2, 0)}),
        ([node("a", 1), node("b", 8)], ["a"], [], {"a": (None, 0.8)}),
        ([node("head", 0), node("a", 2), node("b", 3)], ["a", "b"], [], {"a": (1, 0), "b": (2, 0)}),
        ([node("a", 2), node("b", 1), node("c", 4)], ["a", "b"], [], {"a": (3, 0.8), "b": (2, 0.8)}),
        ([node("a", 2), node("b", 1), node("c", 1)], ["a", "b"], [], {"a": (2, 0), "b": (2, 0)}),
    ],
)
def test_data_tasks_ask_for_no_cpu_where_workers_have_them_all(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, Any]],
    workers: list[str],
    leaving: list[str],
    wanted: dict[str, tuple[int | None, float]],
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr(f"{MODULE}.cluster_state.get_draining_nodes", lambda: dict.fromkeys(leaving, 1))
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    monkeypatch.setattr("ray.util.placement_group_table", dict)
    monkeypatch.delenv("MAE_RAY_EMBEDDED", raising=False)
    assert data_tasks(FixedCompute(data_tasks=2), workers) == wanted


@pytest.mark.parametrize(
    ("state", "other", "num_cpus"),
    [("CREATED", ["a", "b"], 0), ("CREATED", ["b", "b"], 0.8), ("REMOVED", ["a", "b"], 0.8)],
)
def test_data_tasks_ask_for_no_cpu_beside_another_group_on_several_nodes(
    monkeypatch: pytest.MonkeyPatch, state: str, other: list[str], num_cpus: float
) -> None:
    ours = PlacementGroup(PlacementGroupID(b"1" * 18))
    groups = {ours.id.hex(): ("CREATED", ["a", "b"]), "another": (state, other)}
    table = {id: {"state": state, "bundles_to_node_id": dict(enumerate(on))} for id, (state, on) in groups.items()}
    monkeypatch.setattr("ray.nodes", lambda: [node("a", 8), node("b", 8), node("c", 8)])
    monkeypatch.setattr(f"{MODULE}.cluster_state.get_draining_nodes", dict)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: ours)
    monkeypatch.setattr("ray.util.placement_group_table", lambda: table)
    monkeypatch.delenv("MAE_RAY_EMBEDDED", raising=False)
    found = data_tasks(FixedCompute(data_tasks=2), ["a", "b"])
    assert {requested for _, requested in found.values()} == {num_cpus}
