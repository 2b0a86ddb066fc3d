"""List runs for `mae runs`: read their state from their folders, where a live driver writes a heartbeat."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mae_core.errors import UserError
from pipelines.config import RunsConfig
from pipelines.runs.checkpoints import CheckpointStore
from pipelines.runs.metrics import read_points
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

_HEARTBEAT = "pulse.json"
_BEAT_EVERY_S = 15.0
_DEAD_AFTER_S = 60.0
"""Age of the last heartbeat beyond which a driver counts as dead."""
_POLL_EVERY_S = 2.0

State = Literal["running", "trained", "finished", "failed", "stopped"]


class Heartbeat:
    """Write the driver's heartbeat to each run folder while a block runs, and how the block ended if it failed.

    `num_waiting` returns the metric points that MLflow has not confirmed, for each folder.
    """

    def __init__(self, folders: Sequence[Storage], num_waiting: Callable[[], Sequence[int]] = lambda: ()) -> None:
        self._folders, self._num_waiting = folders, num_waiting
        self._since_s = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None:
            said = " ".join(str(error).split()) or type(error).__name__
            self._write(**{"stopped" if isinstance(error, KeyboardInterrupt) else "error": said})

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_EVERY_S):
            self._write()

    def _write(self, *, error: str = "", stopped: str = "") -> None:
        values = {"time_s": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        values |= {"since_s": self._since_s, "error": error, "stopped": stopped}
        waiting = self._num_waiting() or [0] * len(self._folders)
        for storage, num_waiting in zip(self._folders, waiting, strict=True):
            try:
                storage.write(_HEARTBEAT, json.dumps(values | {"num_waiting": num_waiting}).encode())
            except OSError as refused:
                log.warning("could not write the driver's heartbeat to %s: %s", storage.uri, refused)


def last_alive_s(storage: Storage) -> float | None:
    """Return the time of the last heartbeat of any driver of the run, in Unix seconds; None if there was none."""
    return _read(storage, _HEARTBEAT).get("time_s")


def is_driven(storage: Storage, now_s: float) -> bool:
    """Return whether a driver of the run has given a sign of life within a minute, and has not ended since."""
    heartbeat = _read(storage, _HEARTBEAT)
    has_ended = heartbeat.get("error") or heartbeat.get("stopped")
    return now_s - heartbeat.get("time_s", 0) < _DEAD_AFTER_S and not has_ended


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """State of one run, as far as its folder tells."""

    run: str
    """Path of the run folder below the listed URI; empty for the URI itself."""
    kind: str
    state: State
    step: int | None
    """Last step with metrics."""
    total_steps: int | None
    checkpoint: int | None
    """Step of the newest committed checkpoint."""
    loss: float | None
    quiet_s: float | None
    """Seconds since the driver's last heartbeat."""
    error: str
    """Error that ended a failed run; else empty."""
    extends: str = ""
    """The run that this one extends: its path below the listed URI, or its URI; else empty."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the folder of a run tells at one moment. Times are Unix seconds."""

    status: RunStatus
    values: Mapping[str, float] = field(default_factory=dict)
    """Newest value of each metric."""
    started_s: float | None = None
    """Start of the last driver."""
    alive_s: float | None = None
    """Last heartbeat of a driver."""
    checkpoint_s: float | None = None
    """When the training state of the newest checkpoint was copied."""
    num_waiting: int = 0
    """Metric points that MLflow had not confirmed at the last heartbeat."""
    num_failures: int = 0
    """Early ends of worker groups."""
    num_bad_steps: int = 0
    """Steps whose gradient was not finite."""


def list_runs(uri: str) -> list[RunStatus]:
    """Return the status of all runs at or below the URI. Raises UserError if there is none."""
    found = [observation.status for observation in observe_runs(uri)]
    if not found:
        uri = open_storage(uri).uri
        raise UserError(f"no run found in {uri}; try the --output of a run, such as runs or s3://bucket/runs")
    return found


def observe_runs(uri: str, known: Mapping[str, Observation] | None = None) -> list[Observation]:
    """Return what the folders of all runs at or below the URI tell.

    A run that `known` has, by path, as finished is not read again while its outcome is there.
    """
    storage = open_storage(uri)
    paths = [path for path, _ in storage.list()]
    present, found = set(paths), []
    for prefix in [p.removesuffix("run.json") for p in paths if p == "run.json" or p.endswith("/run.json")]:
        earlier = (known or {}).get(prefix.rstrip("/"))
        if earlier and earlier.status.state == "finished" and f"{prefix}outcome.json" in present:
            found.append(earlier)
        else:
            found.append(_observe(storage, prefix, [path for path in paths if path.startswith(prefix)]))
    return found


def runs(uri: str, config: RunsConfig) -> dict[str, Any]:
    """Return what `mae runs` prints: every run, or with `watch` one run, followed until it ends.

    Raises UserError if there is no run, or with `watch` more than one.
    """
    found = list_runs(uri)
    if config.watch:
        if len(found) > 1:
            raise UserError(f"{uri} holds {len(found)} runs; --watch follows one: try {uri.rstrip('/')}/{found[0].run}")
        found = [_follow(uri, found[0])]
    return {"runs": [asdict(status) for status in found], "text": table(found)}


def _follow(uri: str, status: RunStatus) -> RunStatus:
    """Poll the run until it ends, and log each change of state, step or checkpoint; return its last status."""
    logged: RunStatus | None = None
    while True:
        if logged is None or (
            (status.state, status.step, status.checkpoint) != (logged.state, logged.step, logged.checkpoint)
        ):
            log.info("%s", line(status))
            logged = status
        if status.state != "running":
            return status
        time.sleep(_POLL_EVERY_S)
        (status,) = list_runs(uri)


def line(status: RunStatus) -> str:
    """Format a status as one line."""
    of = f" of {status.total_steps}" if status.total_steps else ""
    parts = [status.state, f"step {status.step or 0}{of}"]
    parts += [f"checkpoint {status.checkpoint}"] if status.checkpoint is not None else ["no checkpoint"]
    parts += [f"loss {status.loss:.4f}"] if status.loss is not None else []
    parts += [status.error] if status.error else []
    parts += [f"extends {status.extends}"] if status.extends else []
    return ", ".join(parts)


def table(statuses: Sequence[RunStatus]) -> str:
    """Format statuses as aligned lines: run, kind, status."""
    width = max(len(status.run) for status in statuses)
    return "\n".join(f"{status.run:<{width}}  {status.kind:<8}  {line(status)}".strip() for status in statuses)


def _observe(storage: Storage, prefix: str, paths: Sequence[str]) -> Observation:
    identity, heartbeat = _read(storage, f"{prefix}run.json"), _read(storage, f"{prefix}{_HEARTBEAT}")
    spools = [path for path in paths if path.startswith(f"{prefix}metrics/")]
    newest = _newest_values(storage, spools[-1]) if spools else {}
    checkpoints = CheckpointStore(open_storage(storage.join(prefix.rstrip("/"))))
    newest_step = max(checkpoints.steps(), default=None)
    quiet_s = time.time() - heartbeat["time_s"] if "time_s" in heartbeat else None
    epochs, step = identity.get("config", {}).get("epochs"), newest.get("step")
    extended = identity.get("job", {}).get("extended")
    if epochs and extended:
        epochs += extended["epochs"]
    total = round(step / newest["epoch"] * epochs) if step and epochs and newest.get("epoch") else None
    status = RunStatus(
        run=prefix.rstrip("/"),
        kind=str(identity.get("kind", "")),
        state=_state({path.removeprefix(prefix) for path in paths}, quiet_s, heartbeat),
        step=None if step is None else int(step),
        total_steps=total,
        checkpoint=newest_step,
        loss=newest.get("train/loss"),
        quiet_s=None if quiet_s is None else round(quiet_s, 1),
        error=heartbeat.get("error", ""),
        extends=_extends(storage, prefix) if extended else "",
    )
    return Observation(
        status=status,
        values=newest,
        started_s=heartbeat.get("since_s"),
        alive_s=heartbeat.get("time_s"),
        checkpoint_s=None if newest_step is None else _saved_s(checkpoints, newest_step),
        num_waiting=heartbeat.get("num_waiting", 0),
        num_failures=sum(path.startswith(f"{prefix}failures/") for path in paths),
        num_bad_steps=sum(path.startswith(f"{prefix}bad_steps/") for path in paths),
    )


def _saved_s(checkpoints: CheckpointStore, step: int) -> float | None:
    """Return when a checkpoint's state was copied; None if it does not say, as the first one of an extension."""
    try:
        return checkpoints.meta(step).get("clock", {}).get("time_s")
    except (ValueError, OSError):
        return None  # Damaged, or pruned meanwhile.


def _extends(storage: Storage, prefix: str) -> str:
    """Return the run that a run extends: its path below the storage if it lies there, else its URI."""
    uri = str(_read(storage, f"{prefix}config.json").get("extend", ""))
    return uri.removeprefix(f"{storage.uri.rstrip('/')}/")


def _state(names: set[str], quiet_s: float | None, heartbeat: dict[str, Any]) -> State:
    if "outcome.json" in names:
        return "finished"
    if heartbeat.get("error"):
        return "failed"
    if quiet_s is not None and quiet_s < _DEAD_AFTER_S and not heartbeat.get("stopped"):
        return "running"
    return "trained" if "result.json" in names else "stopped"


def _newest_values(storage: Storage, path: str) -> dict[str, float]:
    """Return the newest value of each metric in a metrics object, and "step"; empty if it cannot be read now."""
    try:
        points = list(read_points(storage.read(path), path))
    except (ValueError, OSError):
        return {}
    values = {point.key: point.value for point in points}
    return values | ({"step": points[-1].step} if points else {})


def _read(storage: Storage, path: str) -> dict[str, Any]:
    """Read a JSON object; empty if it does not exist or is being replaced."""
    try:
        found = json.loads(storage.read(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
