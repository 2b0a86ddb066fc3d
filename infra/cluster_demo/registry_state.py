"""What a registry holds, without what differs from one walk to the next: times, ids, the machine's numbers."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_HISTORY = re.compile(r"([\w-]+)\.([0-9]{6})")
_DECIDED = ("kind", "version", "previous", "why", "gate", "forced", "figures")
_KEPT_TAGS = re.compile(
    r"sha256\..*|handoff\..*|mae\.(kind|parent|licence|origin|[\w-]+\.(why|kind|gate|forced|figures))"
)
_KEPT_METRICS = ("train/loss", "lr", "epoch", "val/top1", "val/loss")


def registry_state(uri: str, store: Any) -> dict[str, Any]:
    """Read every registered model: aliases, their moves, and versions with run, metrics, tags and files.

    `store` is a client of boto3. Files are read from the bucket and hashed, whatever the tags say of them. Raises
    ValueError if one differs from its tag.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = {}
    for model in client.search_registered_models():
        # A search loses aliases.
        model = client.get_registered_model(model.name)
        versions = client.search_model_versions(f"name = '{model.name}'")
        found[model.name] = {
            "aliases": {alias: int(version) for alias, version in sorted(dict(model.aliases).items())},
            "moves": _moves(client, model.tags),
            "versions": {int(version.version): _version(client, store, version) for version in versions},
        }
    return found


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """List every place where two states differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted({*one, *other}, key=str)
        return [
            line
            for key in keys
            for line in differences(one.get(key), other.get(key), f"{where}/{key}" if where else str(key))
        ]
    return [] if one == other else [f"{where}: {_short(one)} and {_short(other)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _moves(client: Any, tags: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return the moves of each alias, oldest first, from the run that holds the model's history."""
    if "mae.history" not in tags:
        return {}
    params = client.get_run(tags["mae.history"]).data.params
    found: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(params):
        if (match := _HISTORY.fullmatch(key)) is not None:
            move = json.loads(params[key])
            is_done = f"{key}.done" in params
            found.setdefault(match[1], []).append({name: move[name] for name in _DECIDED} | {"is_done": is_done})
    return found


def _version(client: Any, store: Any, version: Any) -> dict[str, Any]:
    run = client.get_run(version.run_id)
    tags = {key: value for key, value in dict(version.tags).items() if _KEPT_TAGS.fullmatch(key)}
    files = dict(_files(client, store, version.source.removeprefix("models:/")))
    for name, digest in files.items():
        if (said := tags.get(f"sha256.{name}", digest)) != digest:
            raise ValueError(f"{name} of {version.name} {version.version} has sha256 {digest}, its tag says {said}")
    metrics = {key: _points(client, run, key) for key in _KEPT_METRICS if key in run.data.metrics}
    facts = {"name": run.info.run_name, "status": run.info.status, "dataset": run.data.tags.get("mae.dataset_digest")}
    return {"run": facts, "metrics": metrics, "tags": tags, "files": files}


def _points(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    """Return every point of a metric: one that was delivered twice, or lost, is seen."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def _files(client: Any, store: Any, model_id: str) -> Iterator[tuple[str, str]]:
    """Yield name and sha256 of each file that a version's tags vouch for, as the bucket has it."""
    place = urlsplit(client.get_logged_model(model_id).artifact_location)
    prefix = f"{place.path.strip('/')}/artifacts/"
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=place.netloc, Prefix=prefix)
    for item in (item for page in pages for item in page.get("Contents", [])):
        content = store.get_object(Bucket=place.netloc, Key=item["Key"])["Body"].read()
        yield item["Key"].removeprefix(prefix), hashlib.sha256(content).hexdigest()
