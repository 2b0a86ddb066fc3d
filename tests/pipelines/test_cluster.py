"""What data tasks may ask of a cluster."""

from typing import Any

import pytest

from pipelines.cluster import data_tasks
from pipelines.config import ComputeConfig


def node(name: str, num_cpus: float, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": num_cpus} if num_cpus else {}}


@pytest.mark.parametrize(
    ("nodes", "workers", "leaving", "wanted"),
    [
        ([node("head", 0), node("a", 2), node("b", 2)], ["a", "b"], [], (None, 0.8)),
        ([node("head", 0), node("a", 2)], ["a", "a"], [], (2, 0)),
        ([node("a", 2), node("b", 8)], ["a", "a"], ["b"], (2, 0)),
        ([node("a", 2), node("b", 8, alive=False)], ["a", "a"], [], (2, 0)),
        ([node("a", 1), node("b", 8)], ["a"], [], (None, 0.8)),
    ],
)
def test_data_tasks_ask_for_no_cpu_where_workers_have_them_all(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, Any]],
    workers: list[str],
    leaving: list[str],
    wanted: tuple[int | None, float],
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("pipelines.cluster.cluster_state.get_draining_nodes", lambda: dict.fromkeys(leaving, 1))
    monkeypatch.delenv("MAE_RAY_EMBEDDED", raising=False)
    assert data_tasks(ComputeConfig(data_tasks=2), workers) == wanted
