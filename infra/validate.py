"""Validate compose files and kustomizations; unknown fields are errors.

    python infra/validate.py [PATH ...]

A PATH is a compose file or a folder with a kustomization.yaml; the default is those of this repository. It needs
neither Docker, nor a cluster, nor a network. Exit status 2, with one line per error.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

HERE = Path(__file__).parent
FOLDERS = ("base", "cluster", "handoff", "monitoring", "queue", "overlays/example")
OWN = (HERE / "compose/compose.yaml", *(HERE / "kuberay" / name for name in FOLDERS))


def _sibling(name: str) -> Any:
    """Import a script of this folder, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"infra_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kustomization = _sibling("kustomization")
_COMPOSE = json.loads((HERE / "schemas/compose-spec/compose-spec.json").read_text())
_RAY_JOB = json.loads((HERE / "schemas/ray.io_v1_rayjob.json").read_text())
_RAY_CLUSTER = _RAY_JOB | {
    "properties": _RAY_JOB["properties"]
    | {"kind": {"const": "RayCluster"}, "spec": {"$ref": "#/definitions/rayClusterSpec"}}
}
_KUEUE = json.loads((HERE / "schemas/kueue.x-k8s.io_v1beta1.json").read_text())


def compose_faults(document: Any) -> list[str]:
    """List the errors in a compose file."""
    return _schema_faults(document, _COMPOSE, jsonschema.Draft7Validator)


def object_faults(item: dict[str, Any]) -> list[str]:
    """List the errors in a Kubernetes object; the pod templates of Ray's kinds are checked as pods."""
    where = f"{item.get('kind')} {item.get('metadata', {}).get('name')}"
    if item.get("apiVersion", "").startswith("ray.io/"):
        schema = _RAY_CLUSTER if item.get("kind") == "RayCluster" else _RAY_JOB
        faults = _schema_faults(item, schema, jsonschema.Draft7Validator)
        if not faults:
            faults = [f"{at}: {fault}" for at, pod in pods(item) for fault in _core_faults(pod)]
    elif item.get("apiVersion", "").startswith("kueue.x-k8s.io/"):
        known = _KUEUE["definitions"].get(item.get("kind"))
        schema = {**known, "definitions": _KUEUE["definitions"]} if known else _KUEUE
        faults = _schema_faults(item, schema, jsonschema.Draft7Validator)
    else:
        faults = _core_faults(item)
    return [f"{where}: {fault}" for fault in faults]


def pods(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template of a RayJob or RayCluster as a pod, preceded by its path in the spec."""
    spec = item["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    templates = {"headGroupSpec": cluster["headGroupSpec"]["template"]}
    templates |= {f"workerGroupSpecs.{group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in spec:
        templates["submitterPodTemplate"] = spec["submitterPodTemplate"]
    for where, template in templates.items():
        metadata = {"name": "pod", **template.get("metadata", {})}
        yield where, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _schema_faults(document: Any, schema: Any, validator: Any) -> list[str]:
    errors = validator(schema).iter_errors(document)
    return sorted(f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}" for error in errors)


def _core_faults(item: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path)) or 'top level'}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"kind {error.kind} {error.api_version} is unknown"]
    return []


def faults(path: Path) -> list[str]:
    """List the errors in the compose file or kustomization at `path`."""
    try:
        if path.is_dir():
            return [fault for item in kustomization.resolve(path) for fault in object_faults(item)]
        (document,) = kustomization.load(path)
        return compose_faults(document)
    except (ValueError, OSError) as error:
        return [str(error)]


def main(paths: list[str]) -> int:
    """Print the errors in all paths to stderr; return 2 if there is any, else 0."""
    found = [f"{path}: {fault}" for path in map(Path, paths) for fault in faults(path)]
    print("\n".join(found) or f"{len(paths)} valid", file=sys.stderr if found else sys.stdout)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [str(path) for path in OWN]))
