"""What an evaluation leaves: its folder, which belongs to one evaluation, and its run in MLflow."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from mae_core.errors import UserError
from pipelines.evaluation.models import digest_of
from pipelines.registry import Kind, ModelRef, Tracking
from pipelines.storage import Storage


class Evaluated(Protocol):
    """The model that was evaluated, and where it came from."""

    @property
    def ref(self) -> ModelRef | None: ...
    @property
    def digest(self) -> str: ...
    @property
    def shown(self) -> str: ...


def claim(storage: Storage, file: str, identity: Mapping[str, Any], what: str) -> None:
    """Reserve the folder for one evaluation by a file that holds its identity; `what` names it in errors.

    Raises UserError if the folder holds another evaluation, or something else.
    """
    if not storage.exists(file) and not storage.is_empty():
        raise UserError(f"{storage.uri} is not empty and holds no {what}; choose a new or empty folder")
    if not storage.write_new(file, json.dumps(identity, indent=1, sort_keys=True).encode()):
        found = json.loads(storage.read(file))
        differing = ", ".join(key for key in identity if found.get(key) != identity[key])
        raise UserError(f"{storage.uri} holds the {what} of another {differing}; choose another folder or remove it")


def write_files(storage: Storage, files: Mapping[str, bytes], result: Mapping[str, Any]) -> None:
    """Write the files and then result.json."""
    for name, content in _with_result(files, result).items():
        storage.write(name, content)


def log_run(
    tracking: Tracking,
    kind: Kind,
    params: dict[str, Any],
    identity: Any,
    model: Evaluated,
    files: Mapping[str, bytes],
    result: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    **dataset: Any,
) -> str:
    """Log an evaluation as a run with lineage to the model's version; return its id.

    The same `identity` is the same run, whose metrics are logged once. `dataset` is what `Tracking.run` takes of a
    prepared dataset.
    """
    key = f"{kind}-" + digest_of([json.dumps(identity, sort_keys=True)])[:12]
    tags = {"mae.model": model.shown, "mae.model_digest": model.digest}
    run = tracking.run(key, kind, params, tags=tags, **dataset)
    if model.ref is not None:
        run.log_model_input(model.ref, tag="mae.model")
    known, now_ms = run.last_steps(), int(time.time() * 1000)
    run.log_points([(name, value, 0, now_ms) for name, value in (metrics or {}).items() if name not in known])
    with TemporaryDirectory(prefix=f"mae-{kind}-") as scratch:
        for name, content in _with_result(files, result).items():
            path = Path(scratch) / name
            path.write_bytes(content)
            run.log_file(path)
    run.finish()
    return run.id


def _with_result(files: Mapping[str, bytes], result: Mapping[str, Any]) -> dict[str, bytes]:
    return {**files, "result.json": json.dumps(result, indent=1).encode()}
