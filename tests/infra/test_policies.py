"""What every Kubernetes object of ours keeps to; the cluster that stays, the queue and `ray up` fit together."""

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import parse

Object = dict[str, Any]
FOLDERS = ["base", "cluster", "handoff", "monitoring", "queue", "overlays/example"]
SECRET = re.compile(r"secret|password|token|access_key", re.IGNORECASE)


@pytest.fixture(scope="module")
def objects(infra, repository: Path) -> list[Object]:
    """Return the objects of all folders."""
    folder = repository / "infra/kuberay"
    return [item for name in FOLDERS for item in infra.kustomization.resolve(folder / name)]


@pytest.fixture(scope="module")
def pods(infra, objects: list[Object]) -> list[tuple[str, Object]]:
    """Return every pod that the objects lead to, with the name of what makes it."""

    def made(item: Object) -> Iterator[tuple[str, Object]]:
        if item["kind"] in ("RayJob", "RayCluster"):
            yield from infra.pods(item)
        elif item["kind"] == "CronJob":
            yield "job", item["spec"]["jobTemplate"]["spec"]["template"]
        elif item["kind"] == "Deployment":
            yield "pod", item["spec"]["template"]

    found = [(f"{item['metadata']['name']} {where}", pod) for item in objects for where, pod in made(item)]
    assert len(found) > 12
    return found


def find(objects: list[Object], kind: str, name: str) -> Object:
    return next(item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_is_valid(infra, repository: Path, name: str) -> None:
    assert infra.faults(repository / "infra/kuberay" / name) == []
    assert set(FOLDERS) == set(infra.FOLDERS)


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("RayCluster", "mae", ("spec",)),
        ("RayCluster", "mae", ("spec", "autoscalerOptions")),
        ("RayCluster", "mae", ("spec", "workerGroupSpecs", 1)),
        ("RayCluster", "mae", ("spec", "workerGroupSpecs", 1, "template", "spec")),
        ("CronJob", "mae-nightly", ("spec",)),
        ("Deployment", "mae-exporter", ("spec", "template", "spec", "containers", 0)),
        ("Service", "mae-exporter", ("spec", "ports", 0)),
        ("PodDisruptionBudget", "mae-heads", ("spec",)),
        ("ResourceFlavor", "gpu", ("spec",)),
        ("ClusterQueue", "mae", ("spec", "resourceGroups", 0, "flavors", 0)),
        ("LocalQueue", "gpu", ("spec",)),
    ],
)
def test_an_unknown_field_is_refused(infra, objects, kind: str, name: str, path: tuple[str | int, ...]) -> None:
    broken = copy.deepcopy(find(objects, kind, name))
    assert infra.object_faults(broken) == []
    inner: Any = broken
    for key in path:
        inner = inner[key]
    inner["replicaz"] = "1"
    assert any("replicaz" in fault for fault in infra.object_faults(broken))


def test_an_unknown_kind_is_refused(infra) -> None:
    for version in ("kueue.x-k8s.io/v1beta1", "ray.io/v1", "example.com/v1"):
        item = {"apiVersion": version, "kind": "Cohortz", "metadata": {"name": "a"}, "spec": {}}
        assert infra.object_faults(item)


def test_no_pod_runs_as_root_or_gains_rights(pods) -> None:
    for name, pod in pods:
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] >= 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), name
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert not [volume for volume in pod["spec"]["volumes"] if "hostPath" in volume], name


def test_memory_is_limited_and_requested_alike(pods) -> None:
    for name, pod in pods:
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"], name
            assert resources["requests"]["cpu"], name
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], name


def test_images_are_ours_and_none_is_latest(pods) -> None:
    for name, pod in pods:
        for container in pod["spec"]["containers"]:
            repository, _, tag = container["image"].rpartition(":")
            assert repository.endswith("mae"), name
            assert tag not in ("", "latest"), name


def test_no_secret_is_written_down(objects, pods) -> None:
    assert not [item for item in objects if item["kind"] == "Secret"]
    for item in objects:
        if item["kind"] == "ConfigMap":
            assert not [key for key in item["data"] if SECRET.search(key)]
    for name, pod in pods:
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                is_literal = "value" in variable and SECRET.search(variable["name"])
                assert not is_literal, (name, variable["name"])


def test_only_the_head_that_scales_may_ask_kubernetes(objects, pods) -> None:
    accounts = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ServiceAccount"}
    with_token = {name for name, pod in pods if pod["spec"]["automountServiceAccountToken"] is not False}
    assert with_token == {"mae headGroupSpec"}
    for name, pod in pods:
        assert pod["spec"]["serviceAccountName"] in accounts, name
    assert accounts["mae"]["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in accounts["mae-head"]


def test_the_cluster_scales_from_zero_with_a_group_of_cpus_and_one_of_spot_gpus(objects) -> None:
    spec = find(objects, "RayCluster", "mae")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu-spot"}
    for group in groups.values():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert "nvidia.com/gpu" not in limits["cpu"]
    assert limits["gpu-spot"]["nvidia.com/gpu"] == 8
    assert "spot" in groups["gpu-spot"]["template"]["spec"]["nodeSelector"].values()
    import ray

    assert spec["rayVersion"] == ray.__version__


def test_a_spot_worker_announces_its_end_and_has_the_time_for_a_checkpoint(objects) -> None:
    from ray.scripts.scripts import drain_node

    groups = {group["groupName"]: group for group in find(objects, "RayCluster", "mae")["spec"]["workerGroupSpecs"]}
    pod = groups["gpu-spot"]["template"]["spec"]
    *_, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, waiting = script.split(";", 1)
    program, command, *options = shlex.split(drain)
    assert (program, command) == ("ray", "drain-node")
    given = drain_node.make_context(command, [*options]).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert given["node_id"] is None, "its own"
    (seconds,) = re.findall(r"seq (\d+)", waiting)
    assert int(seconds) <= given["deadline_remaining_seconds"] <= pod["terminationGracePeriodSeconds"]
    assert parse(["pretrain"]).config.compute.grace_s < given["deadline_remaining_seconds"]


def test_cron_jobs_submit_to_the_cluster_that_stays_with_its_own_token(objects) -> None:
    assert find(objects, "RayCluster", "mae")["spec"]["authOptions"] == {"mode": "token"}
    jobs = [item for item in objects if item["kind"] == "CronJob"]
    assert {job["metadata"]["name"] for job in jobs} == {"mae-handoff", "mae-nightly"}
    for job in jobs:
        assert job["spec"]["concurrencyPolicy"] == "Forbid"
        (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["RAY_API_SERVER_ADDRESS"]["value"] == "http://mae-head-svc:8265"
        assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "mae"


def test_the_nightly_run_parses_and_is_submitted_once_a_day(objects) -> None:
    job = find(objects, "CronJob", "mae-nightly")["spec"]
    assert job["timeZone"] == "Etc/UTC"
    (container,) = job["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    assert (shell, flag) == ("sh", "-c")
    assignment, command = script.split(";", 1)
    assert assignment == "day=$(date -u +%Y-%m-%d)"
    words = shlex.split(command.replace("$day", "2026-11-28"))
    submit = parse(words[1:])
    assert (submit.command, submit.config.id, submit.config.detach) == ("submit", "nightly-2026-11-28", True)
    run = parse(list(submit.arguments[1:])).config
    assert run.name == submit.config.id
    groups = {g["groupName"]: g for g in find(objects, "RayCluster", "mae")["spec"]["workerGroupSpecs"]}
    assert run.compute.num_workers <= 8 * groups["gpu-spot"]["maxReplicas"]


def test_disruption_budgets_cover_every_ray_pod(objects, pods) -> None:
    budgets = [item["spec"] for item in objects if item["kind"] == "PodDisruptionBudget"]
    kinds = {budget["selector"]["matchLabels"]["ray.io/node-type"]: budget["maxUnavailable"] for budget in budgets}
    assert kinds == {"head": 0, "worker": 1}
    for name, pod in pods:
        if "GroupSpec" in name:
            assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "mae-ray", name


def test_network_policies_cover_what_listens(objects, pods) -> None:
    selected = [
        item["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
        for item in objects
        if item["kind"] == "NetworkPolicy"
    ]
    listening = {
        pod["metadata"]["labels"]["app.kubernetes.io/name"]
        for _, pod in pods
        if any("ports" in container for container in pod["spec"]["containers"])
    }
    assert listening <= set(selected)
    for item in objects:
        if item["kind"] == "NetworkPolicy":
            assert all(rule.get("from") for rule in item["spec"]["ingress"]), "no rule admits everybody"


def test_the_queue_admits_the_largest_job(infra, objects) -> None:
    (group,) = find(objects, "ClusterQueue", "mae")["spec"]["resourceGroups"]
    quota = {r["name"]: r["nominalQuota"] for flavor in group["flavors"] for r in flavor["resources"]}
    assert find(objects, "LocalQueue", "gpu")["spec"]["clusterQueue"] == "mae"
    jobs = [item for item in objects if item["kind"] == "RayJob" and "labels" in item["metadata"]]
    queues = {job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") for job in jobs} - {None}
    assert queues == {"gpu"}
    for job in jobs:
        cluster = job["spec"]["rayClusterSpec"]
        copies = {"headGroupSpec": 1} | {
            f"workerGroupSpecs.{g['groupName']}": g["replicas"] for g in cluster["workerGroupSpecs"]
        }
        needs = {"cpu": 0, "memory": 0, "nvidia.com/gpu": 0}
        for where, pod in infra.pods(job):
            for name, value in pod["spec"]["containers"][0]["resources"]["requests"].items():
                needs[name] += copies[where] * int(str(value).removesuffix("Gi"))
        for name, need in needs.items():
            assert need <= int(quota[name].removesuffix("Gi")), (job["metadata"]["name"], name)


@pytest.fixture(scope="module")
def ray_up(repository: Path) -> Object:
    """Return the `ray up` file for AWS."""
    return yaml.safe_load((repository / "infra/aws/cluster.yaml").read_text())


def test_rays_own_validator_takes_the_aws_file_and_refuses_an_unknown_field(ray_up: Object) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(ray_up)))
    broken = {**copy.deepcopy(ray_up), "idle_timeout_minuts": 1}
    with pytest.raises(ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(broken))


def test_the_aws_cluster_scales_from_zero_on_spot_and_shows_nothing_to_the_internet(ray_up: Object) -> None:
    assert ray_up["provider"]["use_internal_ips"] is True
    workers = {name: kind for name, kind in ray_up["available_node_types"].items() if name != ray_up["head_node_type"]}
    for name, kind in workers.items():
        assert kind["min_workers"] == 0 < kind["max_workers"], name
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
    assert ray_up["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    for kind in ray_up["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    start = " ".join(ray_up["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert not ray_up["docker"]["image"].endswith((":latest", "mae"))
    assert not re.search(r"AKIA|aws_secret|aws_access_key_id:", yaml.safe_dump(ray_up), re.IGNORECASE)


def test_a_stopped_job_and_a_deleted_pod_have_the_time_for_a_checkpoint(objects, pods, repository: Path) -> None:
    grace_s = parse(["pretrain"]).config.compute.grace_s
    compose = yaml.safe_load((repository / "infra/compose/compose.yaml").read_text())
    stop_waits = [
        value["RAY_JOB_STOP_WAIT_TIME_S"] for value in compose.values() if "RAY_JOB_STOP_WAIT_TIME_S" in value
    ]
    stop_waits += [find(objects, "ConfigMap", "mae-environment")["data"]["RAY_JOB_STOP_WAIT_TIME_S"]]
    assert len(stop_waits) == 2
    assert all(float(wait_s) > grace_s for wait_s in stop_waits)
    specs = [pod["spec"] for _, pod in pods]
    hooked = [pod for pod in specs if "lifecycle" in pod["containers"][0]]
    assert hooked
    for pod in hooked:
        script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        (waits_s,) = map(int, re.findall(r"seq (\d+)", script))
        assert grace_s < waits_s < pod["terminationGracePeriodSeconds"]
