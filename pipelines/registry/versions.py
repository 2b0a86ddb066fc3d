"""Model versions: resolve a URI to a version, fetch and verify its files, trace its lineage."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from mae_core.errors import UserError
from pipelines.registry.outages import retry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

SHA256_TAG = "sha256."
PARENT_TAG = "mae.parent"
LICENCE_TAG, ORIGIN_TAG = "mae.licence", "mae.origin"
"""Of weights that were imported, and of everything trained from them."""
_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[\w-]+)|/(?P<version>[0-9]+))")
_SOURCE = re.compile(r"models:/(?P<id>m-[0-9a-f]{32})")
# What `move_alias` writes: mae.champion.by.
_DECISION = re.compile(r"mae\.[\w-]+\.(by|at|why|kind|gate|run_id|forced|figures)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*")
_OBJECT_STORES = ("s3", "gs", "abfss", "wasbs")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """One version of one registered model. It does not change when an alias moves."""

    name: str
    version: int
    run_id: str
    """Run that created the version."""
    model_id: str
    """MLflow's logged model, which stores the files."""
    sha256: dict[str, str]
    """Hex digest of each file, by name."""
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a model version's lineage."""

    kind: Literal["model version", "run", "dataset", "commit"]
    id: str
    """A models:/NAME/VERSION URI, a run id, a dataset digest or a commit."""
    facts: dict[str, str] = field(default_factory=dict)


def resolve(client: "MlflowClient", model_uri: str) -> ModelRef:
    """Return the version that the URI means now.

    Raises UserError that lists the names, aliases or versions that exist.
    """
    parts = _URI.fullmatch(model_uri)
    if parts is None:
        raise UserError(f"model {model_uri!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION; try one of them")
    name, alias = parts["name"], parts["alias"]
    registered = registered_model(client, name)
    if alias is None:
        found = or_none(lambda: client.get_model_version(name, parts["version"]))
    else:
        found = or_none(lambda: client.get_model_version_by_alias(name, alias))
    if found is None:
        aliases = ", ".join(f"@{a} (version {v})" for a, v in sorted(registered.aliases.items())) or "none"
        newest = max((int(v.version) for v in registered.latest_versions or []), default=0)
        wanted = f"alias @{alias}" if alias else f"version {parts['version']}"
        raise UserError(f"model {name} has no {wanted}; its aliases are {aliases}, its newest version is {newest}")
    return ref_of(found)


def find_by_alias(client: "MlflowClient", model_uri: str) -> ModelRef | None:
    """Return the version that models:/NAME@ALIAS means now; None if there is no such model or alias.

    Raises UserError for another URI, and for a version that this project did not register.
    """
    parts = _URI.fullmatch(model_uri)
    if parts is None or not parts["alias"]:
        raise UserError(f"model {model_uri!r} is not models:/NAME@ALIAS; try models:/mae-vit_base_patch16@champion")
    found = or_none(lambda: client.get_model_version_by_alias(parts["name"], parts["alias"]))
    return ref_of(found) if found else None


def ref_of(version: "ModelVersion") -> ModelRef:
    """Convert MLflow's version to a ModelRef. Raises UserError if this project did not register it."""
    source = _SOURCE.fullmatch(version.source or "")
    prefix = len(SHA256_TAG)
    sha256 = {key[prefix:]: value for key, value in version.tags.items() if key.startswith(SHA256_TAG)}
    if source is None or not sha256:
        raise UserError(
            f"models:/{version.name}/{version.version} was not registered by `mae` (no sha256 tags, or files outside "
            "MLflow's own store); register it with `mae register RUN`"
        )
    return ModelRef(
        name=version.name,
        version=int(version.version),
        run_id=version.run_id or "",
        model_id=source["id"],
        sha256=sha256,
        tags=dict(version.tags),
    )


def inherited_tags(ref: ModelRef) -> dict[str, str]:
    """Return the tags that whatever is trained from this version gets: where it came from, licence and origin."""
    kept = {tag: ref.tags[tag] for tag in (LICENCE_TAG, ORIGIN_TAG) if tag in ref.tags}
    return {PARENT_TAG: ref.uri, **kept}


def model_uri(model: str) -> str:
    """Return the URI of a version that a command names as NAME@ALIAS, NAME/VERSION or as a models:/ URI."""
    return model if model.startswith("models:/") else f"models:/{model}"


def fetch(client: "MlflowClient", tracking_uri: str, ref: ModelRef, folder: Path) -> dict[str, Path]:
    """Download the version's files to `folder` and verify their sha256; return their paths by name.

    A file that is already there with the right content is kept. Raises UserError that names a file with other content,
    or if the files are stored outside what the tracking server owns.
    """
    location = retry(lambda: client.get_logged_model(ref.model_id), ref.uri).artifact_location
    check_location(location, tracking_uri, ref.uri)
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _fetch_file(location, tracking_uri, ref, name, folder) for name in sorted(ref.sha256)}


def check_location(location: str, tracking_uri: str, what: str) -> None:
    """Raise UserError if files at `location` must not be read, because the tracking server does not own that place.

    Anyone who can write to an MLflow server can make a version point anywhere: to a file on this machine, or to an
    address that only this machine can reach, such as a cloud's metadata service.
    """
    parts, server = urlsplit(location), urlsplit(tracking_uri)
    is_file = parts.scheme in ("", "file")
    allowed = (
        (is_file and not parts.netloc and server.scheme == "sqlite")
        or (parts.scheme == "mlflow-artifacts" and parts.netloc in ("", server.netloc.rsplit("@", 1)[-1]))
        or (parts.scheme in _OBJECT_STORES and parts.netloc)
    )
    if not allowed or ".." in Path(unquote(parts.path)).parts or parts.query or parts.fragment:
        raise UserError(
            f"files of {what} are at {location!r}, outside what the tracking server owns; start the server with "
            "--serve-artifacts and register the model again"
        )


def lineage(client: "MlflowClient", model_uri: str) -> list[Step]:
    """Trace a version: classifier version, fine-tune run, backbone version, pretrain run, dataset, commit.

    For a backbone, the list starts at the backbone version.
    """
    steps: list[Step] = []
    seen: set[str] = set()
    ref: ModelRef | None = resolve(client, model_uri)
    tags: dict[str, str] = {}
    while ref is not None and ref.uri not in seen:
        seen.add(ref.uri)
        steps.append(Step(kind="model version", id=ref.uri, facts=_version_facts(ref)))
        run = _found_run(client, ref.run_id)
        tags = run.data.tags if run else {}
        steps.append(Step(kind="run", id=ref.run_id, facts=_run_facts(run)))
        parent = ref.tags.get(PARENT_TAG)
        try:
            ref = resolve(client, parent) if parent else None
        except UserError as error:
            steps.append(Step(kind="model version", id=str(parent), facts={"missing": str(error)}))
            ref, tags = None, {}
    steps.append(Step(kind="dataset", id=tags.get("mae.dataset_digest", "unknown")))
    changed = {"uncommitted_changes": tags.get("mae.uncommitted_changes", "unknown")}
    steps.append(Step(kind="commit", id=tags.get("mlflow.source.git.commit", "unknown"), facts=changed))
    return steps


def _version_facts(ref: ModelRef) -> dict[str, str]:
    facts = {f"sha256 {name}": digest for name, digest in ref.sha256.items()}
    facts |= {tag.removeprefix("mae."): ref.tags[tag] for tag in (LICENCE_TAG, ORIGIN_TAG) if tag in ref.tags}
    return facts | {tag.removeprefix("mae."): ref.tags[tag] for tag in sorted(ref.tags) if _DECISION.fullmatch(tag)}


def _found_run(client: "MlflowClient", run_id: str) -> "Run | None":
    return or_none(lambda: client.get_run(run_id)) if run_id else None


def _run_facts(run: "Run | None") -> dict[str, str]:
    if run is None:
        return {"missing": "the registry does not have this run any more"}
    tags, datasets = run.data.tags, run.inputs.dataset_inputs if run.inputs else []
    sources = [json.loads(found.dataset.source).get("uri", "") for found in datasets]
    return {
        "name": run.info.run_name or "",
        "kind": tags.get("mae.kind", ""),
        "dataset": tags.get("mae.dataset_digest", ""),
        "dataset_uri": ", ".join(filter(None, sources)),
        "commit": tags.get("mlflow.source.git.commit", ""),
        "uncommitted_changes": tags.get("mae.uncommitted_changes", ""),
    }


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file_name(name: str) -> None:
    """Raise UserError if the name could denote a path outside its folder."""
    if not _FILE_NAME.fullmatch(name):
        raise UserError(f"artifact name {name!r} is not a plain file name; try one such as encoder.safetensors")


def _fetch_file(location: str, tracking_uri: str, ref: ModelRef, name: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    check_file_name(name)
    path, expected = folder / name, ref.sha256[name]
    if path.is_file() and sha256_of(path) == expected:
        return path
    source = f"{location.rstrip('/')}/artifacts/{name}"
    with TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        download = retry(
            lambda: download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=tracking_uri), name
        )
        found = sha256_of(Path(download))
        if found != expected:
            raise UserError(
                f"{name} of {ref.uri} has sha256 {found[:12]}... instead of the registered {expected[:12]}...: it was "
                "changed or damaged after registration; register the run again with `mae register`"
            )
        Path(download).rename(path)
    return path


def registered_model(client: "MlflowClient", name: str) -> "RegisteredModel":
    """Return the registered model. Raises UserError that names the nearest if there is none of that name."""
    found = or_none(lambda: client.get_registered_model(name))
    if found is not None:
        return found
    known = sorted(model.name for model in retry(lambda: client.search_registered_models(max_results=100), "models"))
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"registered models: {', '.join(known[:10]) or 'none'}"
    raise UserError(f"no registered model {name!r}; {hint}" + ("" if known else "; run `mae pretrain` first"))


def or_none(get: Callable[[], T]) -> T | None:
    """Return what the registry has, or None if it has no such object."""
    from mlflow.exceptions import MlflowException

    try:
        return retry(get, "the model")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def all_results(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the results of a paged search."""
    token: str | None = None
    while True:
        page = retry(lambda token=token: search(token), "the registry")
        yield from page
        token = page.token
        if not token:
            return
