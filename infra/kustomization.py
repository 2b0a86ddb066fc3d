"""Resolve a kustomization into the objects that `kubectl kustomize` prints, for the few features that we use.

Supported are `resources`, `namespace`, `labels`, `images` and `patches` (JSON 6902, or a merge patch of an object
without lists). Anything else is an error, never skipped. tests/infra compares the result with kubectl's if kubectl is
installed.
"""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_KEYS = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}
_CLUSTER_SCOPED = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ResourceFlavor", "ClusterQueue"}


class _Loader(yaml.CSafeLoader):
    """Load YAML and raise ValueError for a duplicate key, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"key {sorted(twice)[0]!r} is given twice{node.start_mark}; keep one")
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[Any]:
    """Load the YAML documents of a file. Raises ValueError for a duplicate key."""
    documents = yaml.load_all(path.read_text(), _Loader)
    # Through JSON, so that anchors become copies: a patch of one container must not change its siblings.
    return [json.loads(json.dumps(document)) for document in documents if document is not None]


def resolve(folder: Path) -> list[Object]:
    """Return the objects of a kustomization, in the order of its resources. Raises ValueError for other features."""
    (config,) = load(folder / "kustomization.yaml")
    _only(config, _KEYS, folder)
    objects: list[Object] = []
    for name in config.get("resources", []):
        path = folder / name
        objects += resolve(path) if path.is_dir() else load(path)
    for patch in config.get("patches", []):
        _only(patch, {"path", "target"}, folder)
        _patch(objects, load(folder / patch["path"]), patch.get("target"), folder / patch["path"])
    for item in objects:
        if "namespace" in config and item["kind"] not in _CLUSTER_SCOPED:
            item["metadata"]["namespace"] = config["namespace"]
        for label in config.get("labels", []):
            _only(label, {"pairs"}, folder)
            item["metadata"].setdefault("labels", {}).update(label["pairs"])
        for image in config.get("images", []):
            _only(image, {"name", "newName", "newTag"}, folder)
            _set_image(item, image)
    return objects


def _only(mapping: Object, known: set[str], where: Path) -> None:
    for key in sorted(set(mapping) - known):
        raise ValueError(f"{where}: {key!r} is not supported here; supported are {', '.join(sorted(known))}")


def _patch(objects: list[Object], documents: list[Any], target: Object | None, where: Path) -> None:
    patch = documents[0]
    if target is None and not isinstance(patch, dict):
        raise ValueError(f"{where}: a list of operations needs a target; name its kind")
    selector = target or {"kind": patch["kind"], "name": patch["metadata"]["name"]}
    _only(selector, {"group", "version", "kind", "name"}, where)
    matches = [item for item in objects if _matches(item, selector)]
    if not matches:
        raise ValueError(f"{where}: no object matches {selector}; correct the target")
    for item in matches:
        # Copy the patch, so that no two objects share its values.
        if isinstance(patch, dict):
            _merge(item, copy.deepcopy(patch), where)
        else:
            for operation in copy.deepcopy(patch):
                _operate(item, operation, where)


def _matches(item: Object, selector: Object) -> bool:
    group, _, version = item["apiVersion"].rpartition("/")
    facts = {"group": group, "version": version, "kind": item["kind"], "name": item["metadata"]["name"]}
    return all(facts[key] == value for key, value in selector.items())


def _merge(item: Object, patch: Object, where: Path) -> None:
    for key, value in patch.items():
        if isinstance(value, list):
            raise ValueError(f"{where}: {key!r} is a list, which merge patches treat by kind; use JSON 6902 operations")
        if isinstance(value, dict) and isinstance(item.get(key), dict):
            _merge(item[key], value, where)
        elif value is None:
            item.pop(key, None)
        else:
            item[key] = value


def _operate(item: Any, operation: Object, where: Path) -> None:
    """Apply one JSON 6902 operation. Raises ValueError if the parent of its path does not exist."""
    _only(operation, {"op", "path", "value"}, where)
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        try:
            item = item[int(part) if isinstance(item, list) else part]
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"{where}: {operation['path']} has no parent {part!r}; add it first") from None
    if operation["op"] == "add" and isinstance(item, list):
        item.insert(len(item) if last == "-" else int(last), operation["value"])
        return
    key = int(last) if isinstance(item, list) else last
    if operation["op"] != "add" and not (key in item if isinstance(item, dict) else key < len(item)):
        raise ValueError(f"{where}: {operation['path']} does not exist, so {operation['op']} fails; use add")
    if operation["op"] in ("add", "replace"):
        item[key] = operation["value"]
    elif operation["op"] == "remove":
        del item[key]
    else:
        raise ValueError(f"{where}: operation {operation['op']!r} is not supported; use add, replace or remove")


def _set_image(node: Any, image: Object) -> None:
    """Set the new name and tag in every container with that image, at any depth."""
    if isinstance(node, dict):
        for key in ("containers", "initContainers"):
            for container in node.get(key, []):
                name, colon, tag = container["image"].rpartition(":")
                name, tag = (name, tag) if colon and "/" not in tag else (container["image"], "")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            _set_image(value, image)
