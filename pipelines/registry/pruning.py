"""Find model versions that nothing needs, and delete them with their files.

A version is needed if an alias points to it, a rollback can return to it, it is among the newest of its model, a
running run started from it, or a needed version was made from it, of whichever model. Whatever `mae` did not register
is not looked at. Logged models without a version are uploads that were interrupted, or are under way for less than a
day.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_core.errors import UserError
from pipelines.registry.aliases import HISTORY_TAG, aliases_in, read_recorded
from pipelines.registry.outages import retry
from pipelines.registry.runs import BACKBONE_TAG
from pipelines.registry.versions import PARENT_TAG, ModelRef, all_results, check_location, or_none, ref_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

log = logging.getLogger(__name__)

_PAGE = 200
_DAY_MS = 24 * 3600 * 1000
_KINDS = ("backbone", "classifier")


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A version that nothing needs, or a logged model without a version."""

    id: str
    """models:/NAME/VERSION, or the id of the logged model."""
    model_id: str
    ref: ModelRef | None
    """None for a logged model without a version."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What the registry holds: garbage, and for each needed version the reason."""

    garbage: list[Garbage]
    needed: dict[str, str]


def find_garbage(client: "MlflowClient", name: str, *, keep: int, older_than_days: float) -> Inventory:
    """List what nothing needs. `name` restricts what is listed, not what needs it; empty for all models."""
    created_ms: dict[str, int] = {}
    refs: dict[str, ModelRef] = {}
    sources: set[str] = set()
    for version in all_results(lambda token: client.search_model_versions(max_results=_PAGE, page_token=token)):
        sources.add((version.source or "").removeprefix("models:/"))
        try:
            ref = ref_of(version)
        except UserError:
            continue  # Not registered by `mae`.
        refs[ref.uri], created_ms[ref.uri] = ref, int(version.creation_timestamp or 0)
    needed = _needed(client, refs, keep)
    now_ms = int(time.time() * 1000)
    oldest_ms = now_ms - older_than_days * _DAY_MS
    garbage = [
        Garbage(id=uri, model_id=ref.model_id, ref=ref)
        for uri, ref in sorted(refs.items(), key=lambda item: (item[1].name, item[1].version))
        if uri not in needed and created_ms[uri] <= oldest_ms and name in ("", ref.name)
    ]
    if not name:
        for model in _logged_models(client):
            is_ours = (model.tags or {}).get("mae.kind") in _KINDS
            if (
                is_ours
                and model.model_id not in sources
                and model.creation_timestamp <= min(oldest_ms, now_ms - _DAY_MS)
            ):
                garbage.append(Garbage(id=model.model_id, model_id=model.model_id, ref=None))
    return Inventory(garbage=garbage, needed=needed)


def delete_garbage(client: "MlflowClient", tracking_uri: str, found: Garbage) -> bool:
    """Delete the version, its files and its logged model; return whether it was still garbage.

    Killed in between, what is left is a logged model without a version, which the next pruning finds.
    """
    model = or_none(lambda: client.get_logged_model(found.model_id))
    if found.ref is not None:
        ref = found.ref
        if reason := _why_pointed_to(client, ref):
            log.warning("%s is kept: %s since it was listed", ref.uri, reason)
            return False
        retry(lambda: client.delete_model_version(ref.name, str(ref.version)), ref.uri)
    if model is not None:
        _delete_files(model, tracking_uri, found.id)
        retry(lambda: client.delete_logged_model(found.model_id), found.id)
    return True


def _needed(client: "MlflowClient", refs: dict[str, ModelRef], keep: int) -> dict[str, str]:
    """Return the URI of each needed version, with the reason."""
    needed: dict[str, str] = {}
    by_name: dict[str, list[ModelRef]] = {}
    for ref in refs.values():
        by_name.setdefault(ref.name, []).append(ref)
    for name, versions in by_name.items():
        newest = sorted(versions, key=lambda ref: -ref.version)[:keep]
        needed |= {ref.uri: f"one of the {keep} newest" for ref in newest}
        needed |= {f"models:/{name}/{version}": reason for version, reason in _pointed_to(client, name).items()}
    for uri in _used_by_running(client):
        needed.setdefault(uri, "a running run started from it")
    waiting = list(needed)
    while waiting:
        child = waiting.pop()
        parent = refs[child].tags.get(PARENT_TAG) if child in refs else None
        if parent and parent not in needed:
            needed[parent] = f"{child} was made from it"
            waiting.append(parent)
    return needed


def _pointed_to(client: "MlflowClient", name: str) -> dict[int, str]:
    """Return the versions that an alias points to or that a rollback can return to, with the reason."""
    model = retry(lambda: client.get_registered_model(name), name)
    found: dict[int, str] = {}
    if run_id := model.tags.get(HISTORY_TAG):
        for alias in aliases_in(client, run_id):
            history = read_recorded(client, run_id, name, alias)
            found |= dict.fromkeys(history.in_use, f"a rollback of @{alias} can return to it")
    return found | {int(version): f"@{alias}" for alias, version in model.aliases.items()}


def _why_pointed_to(client: "MlflowClient", ref: ModelRef) -> str:
    return _pointed_to(client, ref.name).get(ref.version, "")


def _used_by_running(client: "MlflowClient") -> Iterator[str]:
    for run in all_results(
        lambda token: client.search_runs(
            _experiment_ids(client), "attributes.status = 'RUNNING'", max_results=_PAGE, page_token=token
        )
    ):
        tags = run.data.tags
        yield from (tags[tag] for tag in (BACKBONE_TAG, "mae.model", "mae.champion") if tag in tags)


def _logged_models(client: "MlflowClient") -> Iterator["LoggedModel"]:
    ids = _experiment_ids(client)
    return all_results(lambda token: client.search_logged_models(ids, max_results=_PAGE, page_token=token))


def _experiment_ids(client: "MlflowClient") -> list[str]:
    experiments = all_results(lambda token: client.search_experiments(max_results=_PAGE, page_token=token))
    return [found.experiment_id for found in experiments]


def _delete_files(model: "LoggedModel", tracking_uri: str, what: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    check_location(model.artifact_location, tracking_uri, what)
    repository = get_artifact_repository(model.artifact_location, tracking_uri=tracking_uri)
    retry(repository.delete_artifacts, what)
