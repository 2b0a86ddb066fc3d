"""The manifests are valid with unknown fields refused, and their parts agree with each other."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.waiting import COMMAND_DEADLINE_S

Object = dict[str, Any]
FOLDERS = ["base", "overlays/example"]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, repository: Path) -> Path:
    return repository / "infra/kuberay" / request.param


@pytest.fixture
def objects(infra, folder: Path) -> list[Object]:
    return infra.kustomization.resolve(folder)


@pytest.fixture
def jobs(objects: list[Object]) -> list[Object]:
    return [item for item in objects if item["kind"] == "RayJob"]


def find(objects: list[Object], kind: str) -> Object:
    return next(item for item in objects if item["kind"] == kind)


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def test_manifests_are_valid(infra, folder: Path) -> None:
    assert infra.faults(folder) == []


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
WORKER = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayJob", ()),
        ("RayJob", ("metadata",)),
        ("RayJob", ("spec",)),
        ("RayJob", ("spec", "rayClusterSpec")),
        ("RayJob", ("spec", "rayClusterSpec", "authOptions")),
        ("RayJob", HEAD),
        ("RayJob", WORKER),
        ("RayJob", (*WORKER, "template")),
        ("RayJob", (*HEAD, "template", "spec")),
        ("RayJob", (*WORKER, "template", "spec")),
        ("RayJob", (*WORKER, "template", "spec", "containers", 0)),
        ("RayJob", (*WORKER, "template", "spec", "containers", 0, "resources")),
        ("RayJob", (*WORKER, "template", "spec", "volumes", 0, "emptyDir")),
        ("ConfigMap", ()),
        ("ServiceAccount", ()),
        ("NetworkPolicy", ("spec",)),
        ("NetworkPolicy", ("spec", "ingress", 0)),
    ],
)
def test_an_unknown_field_is_refused(infra, objects: list[Object], kind: str, path: tuple[str | int, ...]) -> None:
    broken = copy.deepcopy(find(objects, kind))
    inner: Any = broken
    for key in path:
        inner = inner[key]
    inner["replicaz"] = "1"
    (fault,) = infra.object_faults(broken)
    assert "replicaz" in fault


def change(item: Object, path: tuple[str | int, ...], value: Any) -> Object:
    changed = copy.deepcopy(item)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "ray.io/v1alpha1"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "shutdownAfterJobFinishes"), False),
        (("spec", "submissionMode"), "Http"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        ((*HEAD, "rayStartParams", "num-cpus"), 0),
        ((*WORKER, "replicas"), -1),
        ((*WORKER, "template", "spec", "containers", 0, "image"), 3),
        ((*HEAD, "template", "spec", "containers"), None),
    ],
)
def test_a_wrong_value_is_refused(infra, jobs: list[Object], path: tuple[str | int, ...], value: Any) -> None:
    assert infra.object_faults(change(jobs[0], path, value))


def test_kubectl_resolves_to_the_same_objects(objects: list[Object], folder: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is absent; install it from your distribution to compare our resolver with kustomize")
    command = ["kubectl", "kustomize", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_DEADLINE_S).stdout
    theirs = list(yaml.safe_load_all(printed))

    def order(item: Object) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    assert sorted(objects, key=order) == sorted(theirs, key=order)


def test_a_job_ends_its_cluster_and_a_retry_resumes(jobs: list[Object]) -> None:
    assert {job["metadata"]["name"] for job in jobs} == {"mae-pretrain", "mae-sweep", "mae-finetune"}
    for job in jobs:
        spec = job["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["backoffLimit"] > 0
        words = spec["entrypoint"].split()
        assert words[words.index("--name") + 1]
        assert words[words.index("--output") + 1].startswith("s3://")


def test_a_head_runs_no_work_and_is_not_reached_from_outside(jobs: list[Object], objects: list[Object]) -> None:
    policy = find(objects, "NetworkPolicy")["spec"]
    for job in jobs:
        cluster = job["spec"]["rayClusterSpec"]
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert head["serviceType"] == "ClusterIP"
        assert cluster["authOptions"] == {"mode": "token"}
        assert policy["podSelector"]["matchLabels"].items() <= head["template"]["metadata"]["labels"].items()
    assert not {"Ingress", "Secret"} & {item["kind"] for item in objects}


def test_every_gpu_has_one_worker(infra, jobs: list[Object]) -> None:
    from pipelines.cli import parse

    for job in jobs:
        config = parse(job["spec"]["entrypoint"].split()[1:]).config
        wanted = getattr(config, "max_concurrent", 1) * getattr(config, "pretrain", config).compute.num_workers
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        assert wanted == group["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
        assert getattr(config, "pretrain", config).compute.gpu is True


def test_shared_memory_holds_the_object_store(infra, jobs: list[Object]) -> None:
    for job in jobs:
        for _, pod in infra.pods(job):
            (container,) = pod["spec"]["containers"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod["spec"]["volumes"]}
            shm = volumes[mounts["/dev/shm"]]
            assert shm["medium"] == "Memory"
            memory_gib = gib(container["resources"]["limits"]["memory"])
            assert 0.3 * memory_gib <= gib(shm["sizeLimit"]) < memory_gib
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_pods_are_not_root_and_get_no_more_rights(infra, jobs: list[Object]) -> None:
    for job in jobs:
        for _, pod in infra.pods(job):
            assert pod["spec"]["securityContext"]["runAsUser"] == 10001
            assert pod["spec"]["automountServiceAccountToken"] is False
            for container in pod["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_what_pods_refer_to_exists(infra, jobs: list[Object], objects: list[Object], repository: Path) -> None:
    documented = re.findall(r"create secret generic (\S+)", (repository / "infra/README.md").read_text())
    names = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for job in jobs:
        for _, pod in infra.pods(job):
            assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in names
            (container,) = pod["spec"]["containers"]
            sources = {kind: value["name"] for source in container["envFrom"] for kind, value in source.items()}
            assert ("ConfigMap", sources["configMapRef"]) in names
            assert sources["secretRef"] in documented
    assert find(objects, "ConfigMap")["data"]["MLFLOW_TRACKING_URI"].startswith("http")


def test_the_ray_version_is_the_installed_one(jobs: list[Object]) -> None:
    import ray

    assert {job["spec"]["rayClusterSpec"]["rayVersion"] for job in jobs} == {ray.__version__}


def test_the_overlay_names_a_queue_and_pins_the_image(infra, repository: Path) -> None:
    objects = infra.kustomization.resolve(repository / "infra/kuberay/overlays/example")
    for job in [item for item in objects if item["kind"] == "RayJob"]:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
        for _, pod in infra.pods(job):
            assert [c["image"] for c in pod["spec"]["containers"]] == ["registry.example.com/ml/mae:0.1.0-cuda"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("helmCharts: []", "'helmCharts' is not supported"),
        ("resources: [a.yaml]\nresources: [b.yaml]", "'resources' is given twice"),
        ("patches: [{path: p.yaml, options: {}}]", "'options' is not supported"),
    ],
)
def test_a_kustomization_that_we_cannot_resolve_is_refused(infra, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "kustomization.yaml").write_text(text)
    (fault,) = infra.faults(tmp_path)
    assert words in fault


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("[{op: add, path: /spec/nowhere/x, value: 1}]", "no parent 'nowhere'"),
        ("[{op: replace, path: /metadata/annotations, value: {}}]", "does not exist, so replace fails"),
        ("[{op: move, path: /metadata/name, value: x}]", "'move' is not supported"),
        ("{spec: {containers: []}}", "is a list"),
    ],
)
def test_a_patch_that_does_not_apply_is_refused(infra, tmp_path: Path, patch: str, words: str) -> None:
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [pod.yaml]\npatches: [{path: patch.yaml, target: {kind: Pod}}]"
    )
    (tmp_path / "pod.yaml").write_text("{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: []}}")
    (tmp_path / "patch.yaml").write_text(patch)
    (fault,) = infra.faults(tmp_path)
    assert words in fault


def test_a_patch_of_one_anchored_container_leaves_the_other(infra, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [pod.yaml]\npatches: [{path: patch.yaml, target: {kind: Pod}}]"
    )
    (tmp_path / "pod.yaml").write_text("{apiVersion: v1, kind: Pod, metadata: {name: p}, a: &x {k: 1}, b: *x}")
    (tmp_path / "patch.yaml").write_text("[{op: replace, path: /a/k, value: 2}]")
    (pod,) = infra.kustomization.resolve(tmp_path)
    assert (pod["a"], pod["b"]) == ({"k": 2}, {"k": 1})


def hook(pod: Object) -> str:
    """Return the shell command that runs in the pod's container before it is stopped."""
    (container,) = pod["spec"]["containers"]
    shell, flag, command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("sh", "-c")
    return command


def run_alone(folder: Path, script: str) -> None:
    """Run a shell script in a PID namespace of its own, where it sees and signals no process but those it starts."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "-c", "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces; run this on Linux with util-linux and user namespaces")
    (folder / "script").write_text(script)
    subprocess.run([*command, "-e", "script"], cwd=folder, check=True, timeout=COMMAND_DEADLINE_S)


@pytest.mark.slow
def test_a_head_that_is_deleted_stops_its_driver_and_waits_for_its_end(jobs: list[Object], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    driver = tmp_path / "bin/mae"
    driver.write_text("trap 'sleep 0.5; touch ended; exit' TERM\ntouch begun\nwhile true; do sleep 0.05; done\n")
    for job in jobs:
        command = hook(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])
        start = "rm -f begun ended; sh bin/mae pretrain & until [ -e begun ]; do sleep 0.05; done"
        run_alone(tmp_path, f"{start}\n{command}\n[ -e ended ]\n")


@pytest.mark.slow
def test_a_worker_that_is_deleted_waits_for_the_end_of_its_ranks(jobs: list[Object], tmp_path: Path) -> None:
    (tmp_path / "ray::RayTrainWorker").write_text("touch begun; sleep 1; touch ended\n")
    for job in jobs:
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        start = "rm -f begun ended; sh ray::RayTrainWorker & until [ -e begun ]; do sleep 0.05; done"
        run_alone(tmp_path, f"{start}\n{hook(group['template'])}\n[ -e ended ]\n")


@pytest.fixture
def handoff(infra, repository: Path) -> list[Object]:
    assert infra.faults(repository / "infra/kuberay/handoff") == []
    return infra.kustomization.resolve(repository / "infra/kuberay/handoff")


def test_the_reconciler_reads_a_plan_that_is_one(handoff: list[Object], tmp_path: Path) -> None:
    from pipelines.cli import parse
    from pipelines.handoff.jobs_file import read_plan

    (container,) = pod_of(find(handoff, "CronJob"))["containers"]
    assert parse(container["args"][1:]).config.jobs == "/etc/mae/handoff.yaml"
    (tmp_path / "handoff.yaml").write_text(find(handoff, "ConfigMap")["data"]["handoff.yaml"])
    assert read_plan(str(tmp_path / "handoff.yaml")).output.startswith("s3://")
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (jobs,) = [volume for volume in pod_of(find(handoff, "CronJob"))["volumes"] if volume["name"] == mounts["/etc/mae"]]
    assert jobs["configMap"]["name"] == find(handoff, "ConfigMap")["metadata"]["name"]


def test_the_reconciler_has_no_rights_and_no_secret_in_a_literal(handoff: list[Object], repository: Path) -> None:
    spec = find(handoff, "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    pod = pod_of(find(handoff, "CronJob"))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    literals = {variable["name"] for variable in container["env"] if "value" in variable}
    assert literals == {"RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"}


def test_an_unknown_field_of_the_reconciler_is_refused(infra, handoff: list[Object]) -> None:
    for path in ((), ("spec",), ("spec", "jobTemplate", "spec"), ("spec", "jobTemplate", "spec", "template", "spec")):
        (fault,) = infra.object_faults(change(find(handoff, "CronJob"), (*path, "replicaz"), "1"))
        assert "replicaz" in fault


def pod_of(cron_job: Object) -> Object:
    return cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
