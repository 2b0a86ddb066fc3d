"""Runs at a URI: what their drivers say of them while they live, and what `mae runs` reads from their folders."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mae_core.errors import UserError
from pipelines.config import RunsConfig
from pipelines.runs.checkpoints import CheckpointStore
from pipelines.runs.metrics import read_points
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_PULSE = "pulse.json"
_BEAT_EVERY_S = 15.0
_SILENT_AFTER_S = 60.0
_LOOK_EVERY_S = 2.0

State = Literal["running", "trained", "finished", "failed", "stopped"]


class Pulse:
    """While the block runs, each run's folder says that its driver lives; after a failure, what went wrong."""

    def __init__(self, folders: Sequence[Storage]) -> None:
        self._folders = folders
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._say("")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join()
        if error is not None:
            self._say(" ".join(str(error).split()) or type(error).__name__)

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_EVERY_S):
            self._say("")

    def _say(self, error: str) -> None:
        said = {"time_s": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "error": error}
        for storage in self._folders:
            try:
                storage.write(_PULSE, json.dumps(said).encode())
            except OSError as refused:
                log.warning("%s does not say that its driver lives: %s", storage.uri, refused)


def last_alive_s(storage: Storage) -> float | None:
    """When a driver of the run was last alive, in Unix seconds; None where none ever was."""
    return _read(storage, _PULSE).get("time_s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a run's folder says."""

    run: str
    """The folder, relative to the URI that was asked for; empty for that itself."""
    kind: str
    state: State
    step: int | None
    """The last step that left metrics."""
    total_steps: int | None
    checkpoint: int | None
    """The step of the newest committed checkpoint."""
    loss: float | None
    quiet_s: float | None
    """Seconds since the driver was last heard of."""
    error: str
    """What ended a run that failed."""


def list_runs(uri: str) -> list[Row]:
    """The runs below the URI, or that which it names. Raises UserError where there is none."""
    storage = open_storage(uri)
    paths = [path for path, _ in storage.list()]
    found = [path.removesuffix("run.json") for path in paths if path == "run.json" or path.endswith("/run.json")]
    if not found:
        raise UserError(f"no run lies in {storage.uri}; try the --output of a run, such as runs or s3://bucket/runs")
    return [_row(storage, prefix, [path for path in paths if path.startswith(prefix)]) for prefix in found]


def runs(uri: str, config: RunsConfig) -> dict[str, Any]:
    """What `mae runs` prints: every run, or one that was followed until it ended."""
    rows = list_runs(uri)
    if config.watch:
        if len(rows) > 1:
            raise UserError(f"{uri} holds {len(rows)} runs; --watch follows one: try {uri.rstrip('/')}/{rows[0].run}")
        rows = [_follow(uri, rows[0])]
    return {"runs": [asdict(row) for row in rows], "text": table(rows)}


def _follow(uri: str, row: Row) -> Row:
    """The run as it was when it had ended; each step that leaves metrics is a line of the log until then."""
    shown: Row | None = None
    while True:
        if shown is None or (row.state, row.step, row.checkpoint) != (shown.state, shown.step, shown.checkpoint):
            log.info("%s", line(row))
            shown = row
        if row.state != "running":
            return row
        time.sleep(_LOOK_EVERY_S)
        (row,) = list_runs(uri)


def line(row: Row) -> str:
    """The run in one line."""
    of = f" of {row.total_steps}" if row.total_steps else ""
    parts = [row.state, f"step {row.step or 0}{of}"]
    parts += [f"checkpoint {row.checkpoint}"] if row.checkpoint is not None else ["no checkpoint"]
    parts += [f"loss {row.loss:.4f}"] if row.loss is not None else []
    parts += [row.error] if row.error else []
    return ", ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The runs as a person reads them."""
    width = max(len(row.run) for row in rows)
    return "\n".join(f"{row.run:<{width}}  {row.kind:<8}  {line(row)}".strip() for row in rows)


def _row(storage: Storage, prefix: str, paths: Sequence[str]) -> Row:
    described, pulse = _read(storage, f"{prefix}run.json"), _read(storage, f"{prefix}{_PULSE}")
    spools = [path for path in paths if path.startswith(f"{prefix}metrics/")]
    newest = _newest_values(storage, spools[-1]) if spools else {}
    committed = CheckpointStore(open_storage(storage.join(prefix.rstrip("/")))).steps()
    quiet_s = time.time() - pulse["time_s"] if "time_s" in pulse else None
    epochs, step = described.get("config", {}).get("epochs"), newest.get("step")
    total = round(step / newest["epoch"] * epochs) if step and epochs and newest.get("epoch") else None
    return Row(
        run=prefix.rstrip("/"),
        kind=str(described.get("kind", "")),
        state=_state({path.removeprefix(prefix) for path in paths}, quiet_s, pulse.get("error", "")),
        step=None if step is None else int(step),
        total_steps=total,
        checkpoint=max(committed, default=None),
        loss=newest.get("train/loss"),
        quiet_s=None if quiet_s is None else round(quiet_s, 1),
        error=pulse.get("error", ""),
    )


def _state(names: set[str], quiet_s: float | None, error: str) -> State:
    if "outcome.json" in names:
        return "finished"
    if error:
        return "failed"
    if quiet_s is not None and quiet_s < _SILENT_AFTER_S:
        return "running"
    return "trained" if "result.json" in names else "stopped"


def _newest_values(storage: Storage, path: str) -> dict[str, float]:
    """The last values of the spool's last object, with their step; nothing where it cannot be read now."""
    try:
        points = list(read_points(storage.read(path), path))
    except (ValueError, OSError):
        return {}
    values = {point.key: point.value for point in points}
    return values | ({"step": points[-1].step} if points else {})


def _read(storage: Storage, path: str) -> dict[str, Any]:
    """A JSON object; empty where there is none, or where it is being replaced."""
    try:
        found = json.loads(storage.read(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
