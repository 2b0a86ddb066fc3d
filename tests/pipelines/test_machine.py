"""A control group's CPU limit is found where it is set: for the group, above it, or for a container."""

from pathlib import Path

import pytest

from pipelines.machine import cpu_limits, has_gpu_driver, num_cores


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 100000"}, [4.0, 1.5]),
        ("0::/not/seen/from/here", {"cpu.max": "200000 100000"}, [2.0]),
        (
            "3:cpu,cpuacct:/pod\n2:cpuset:/pod\n0::/",
            {"cpu/pod/cpu.cfs_quota_us": "50000", "cpu/pod/cpu.cfs_period_us": "100000"},
            [0.5],
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("0::/", {}, []),
    ],
)
def test_the_limits_of_the_group_and_of_those_above_it(
    groups: str, files: dict[str, str], limits: list[float], tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert list(cpu_limits(tmp_path)) == limits


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert list(cpu_limits(tmp_path)) == []


def test_a_limit_below_one_cpu_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.machine.cpu_limits", lambda: iter([0.5, 4.0]))
    assert num_cores() == 1


def test_torch_is_not_asked_for_gpus_where_no_driver_has_a_device(tmp_path: Path) -> None:
    assert not has_gpu_driver(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert has_gpu_driver(tmp_path)
