"""What `make cluster-demo` relies on, without its servers: the comparison, the end of all processes, its presets."""

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.config import ClassifyConfig, GateConfig, load_preset
from pipelines.handoff.jobs_file import config_of, read_plan
from tests.services import infra_module, processes
from tests.waiting import KILLED_DEADLINE_S

FOLDER = Path(__file__).parents[2] / "infra/cluster_demo"
STATE: dict[str, Any] = {
    "mae-vit": {
        "aliases": {"champion": 1},
        "moves": {"champion": [{"kind": "promote", "version": 1}]},
        "versions": {1: {"files": {"encoder.safetensors": "aa"}, "metrics": {"train/loss": [(1, 0.5), (2, 0.4)]}}},
    }
}


@pytest.fixture(scope="module")
def registry_state() -> ModuleType:
    return infra_module("cluster_demo/registry_state.py")


def test_equal_registries_have_no_difference(registry_state: ModuleType) -> None:
    assert registry_state.differences(STATE, copy.deepcopy(STATE)) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("aliases", "champion"), 2, "mae-vit/aliases/champion: 1 and 2"),
        (("versions", 1, "files", "encoder.safetensors"), "bb", 'encoder.safetensors: "aa" and "bb"'),
        (("versions", 1, "metrics", "train/loss"), [(1, 0.5)], "train/loss: [[1, 0.5], [2, 0.4]] and [[1, 0.5]]"),
        (("versions", 2), {"files": {"config.json": "cc"}}, 'mae-vit/versions/2: null and {"files"'),
    ],
)
def test_every_difference_is_named_with_both_values(
    registry_state: ModuleType, path: tuple[Any, ...], value: Any, said: str
) -> None:
    other = copy.deepcopy(STATE)
    inner = other["mae-vit"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (line,) = registry_state.differences(STATE, other)
    assert said in line


def test_every_process_with_the_mark_ends_also_one_in_a_session_of_its_own() -> None:
    mark = "MAE_TEST_CLUSTER_DEMO=1"
    name, _, value = mark.partition("=")
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={name: value}, start_new_session=True
    )
    assert child.stdin is not None
    with child.stdin:
        processes().end_all(mark)
        assert child.wait(KILLED_DEADLINE_S) < 0
    assert processes().marked_processes(mark) == []


def test_a_process_has_its_environment_from_its_first_moment() -> None:
    """Linux shows an empty one while a program is being executed, as of 25 in 300 processes just started."""
    for _ in range(100):
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, env={"MAE_TEST_CLUSTER_DEMO": "2"}) as child:
            assert processes().environment_of(Path(f"/proc/{child.pid}")) == b"MAE_TEST_CLUSTER_DEMO=2\0"


def test_its_presets_and_its_jobs_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER / "jobs")
    gate = load_preset(GateConfig, "gate.yaml")
    assert load_preset(ClassifyConfig, gate.train).classifier.method == "probe"
    plan = read_plan("handoff.yaml")
    assert [job.name for job in plan.jobs] == ["whole", "last-block"]
    assert [config_of(job).classifier.train_blocks for job in plan.jobs] == [None, 1]
