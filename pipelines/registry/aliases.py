"""Move an alias only if nobody else did in the meantime. MLflow's alias has no such operation; its parameters have.

The history of the aliases of a model is a run, and each move of an alias is one numbered parameter of it. MLflow stores
a parameter once: its database refuses another value for the same key (primary key of run and key), whoever asks.

1. Read the newest record, number n, and decide.
2. Write record n + 1. If MLflow refuses it, somebody else moved the alias first: tell the caller, change nothing.
3. Point MLflow's alias to the version of the record, and note that this is done.

A record that is not done is of a process that died between 2 and 3: whoever reads the history next completes it. If it
is done and the alias points elsewhere, the alias was moved by other means, which is recorded as well.

The price: step 3 overwrites. A process that is stopped between its last check and step 3, for as long as another
one's move takes, sets the alias to the older of the two records. It notices, and sets the alias to the newest record.
"""

import getpass
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from mae_core.errors import UserError
from pipelines.registry.outages import retry
from pipelines.registry.versions import ModelRef, or_none, registered_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

HISTORY_TAG = "mae.history"
"""Of a registered model: the run that holds the history of its aliases."""
_RECORD = r"\.([0-9]{6})"
_ALIAS = re.compile(r"(?!latest$|v[0-9]+$)[A-Za-z][\w-]{0,99}")
_LONGEST_WHY = 1000
# What sqlite, Postgres and MySQL say of a second row with the same key.
_SET_AT_ONCE = re.compile("UNIQUE constraint|duplicate key|Duplicate entry")


class AliasMoved(UserError):
    """Somebody else moved the alias since its history was read."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why an alias moves, and by whose decision."""

    kind: Literal["promote", "rollback", "outside"]
    """outside: the alias was moved by other means than `mae`."""
    why: str = ""
    gate: str = ""
    """Preset of the gate that the version went through; empty for none."""
    run_id: str = ""
    """MLflow run of the gate's evaluation."""
    forced: bool = False
    """Whether the alias moved although the gate refused, or without one."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The gate's figures."""


@dataclass(frozen=True, kw_only=True)
class Move(Decision):
    """One move of an alias, as the history records it. Version 0 stands for no alias."""

    number: int
    version: int
    previous: int
    by: str
    at: str
    """UTC, in ISO 8601."""
    nonce: str = ""
    """Tells two records apart that are equal otherwise."""
    is_done: bool = False
    """Whether MLflow's alias follows."""


@dataclass(frozen=True, kw_only=True)
class AliasHistory:
    """All moves of an alias, oldest first."""

    name: str
    alias: str
    run_id: str
    moves: tuple[Move, ...]

    @property
    def version(self) -> int:
        """Version that the alias points to; 0 if there is no such alias."""
        return self.moves[-1].version if self.moves else 0

    @property
    def number_of_next(self) -> int:
        """Number of the record that the next move writes."""
        return len(self.moves) + 1

    @property
    def in_use(self) -> list[int]:
        """Versions that were promoted and not rolled back, oldest first: a rollback goes to the last but one."""
        stack: list[int] = []
        for move in self.moves:
            if move.kind == "rollback":
                while stack and stack[-1] != move.version:
                    stack.pop()
            elif move.version:
                stack.append(move.version)
        return stack

    @property
    def shown(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def check_alias(alias: str) -> None:
    """Raise UserError if MLflow or this project does not allow an alias of that name to be promoted to."""
    if alias == "candidate":
        raise UserError("alias 'candidate' is that of the newest version, which training moves; try --to champion")
    if not _ALIAS.fullmatch(alias):
        raise UserError(f"alias {alias!r} is none that MLflow allows (letters, digits, _ and -); try --to champion")


def read_history(client: "MlflowClient", name: str, alias: str) -> AliasHistory:
    """Read the moves of an alias; first complete one whose process died, or record one made by other means.

    Raises UserError if there is no such model.
    """
    check_alias(alias)
    run_id = _history_run(client, name)
    while True:
        history = read_recorded(client, run_id, name, alias)
        if history.moves and not history.moves[-1].is_done:
            _follow(client, history)
            continue
        actual = _pointed_to(client, name, alias)
        if actual == history.version:
            return history
        outside = _next_move(history, actual, Decision(kind="outside", why="moved by other means than `mae`"))
        if _write(client, run_id, f"{alias}.{outside.number:06d}", _to_json(outside)):
            _mark_done(client, run_id, alias, outside)


def move_alias(client: "MlflowClient", history: AliasHistory, ref: ModelRef, decision: Decision) -> AliasHistory:
    """Point the alias to the version, if its history is still the given one; return the new history.

    The decision becomes tags of the version. Raises AliasMoved, which says who moved the alias, if it is not.
    """
    move = _next_move(history, ref.version, decision)
    if not _write(client, history.run_id, f"{history.alias}.{move.number:06d}", _to_json(move)):
        other = read_recorded(client, history.run_id, history.name, history.alias).moves[len(history.moves)]
        raise AliasMoved(
            f"{history.shown} was moved from {_shown(other.previous)} to {_shown(other.version)} by {other.by} at "
            f"{other.at} meanwhile, so {ref.uri} was not compared with what it points to; run the same command again"
        )
    return _follow(client, history)


def decider() -> str:
    """Return who decides: the user that MLflow authenticates, or the login, and the machine."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    try:
        user = user or getpass.getuser()
    except (KeyError, OSError):  # A container's user need not be in its /etc/passwd.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def check_why(why: str) -> None:
    """Raise UserError if the reason is longer than the history can hold."""
    if len(why) > _LONGEST_WHY:
        raise UserError(f"why has {len(why)} characters, of which the history keeps {_LONGEST_WHY}; shorten it")


def _shown(version: int) -> str:
    return f"version {version}" if version else "no version"


def _next_move(history: AliasHistory, version: int, decision: Decision) -> Move:
    return Move(
        **asdict(decision),
        number=history.number_of_next,
        version=version,
        previous=history.version,
        by=decider() if decision.kind != "outside" else "unknown",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        nonce=secrets.token_hex(4),
    )


def _to_json(move: Move) -> str:
    return json.dumps({key: value for key, value in asdict(move).items() if key != "is_done"})


def aliases_in(client: "MlflowClient", run_id: str) -> list[str]:
    """Return the aliases whose moves the history in that run holds."""
    params = retry(lambda: client.get_run(run_id), "the history").data.params
    return sorted({key.rpartition(".")[0] for key in params if re.fullmatch(".+" + _RECORD, key)})


def read_recorded(client: "MlflowClient", run_id: str, name: str, alias: str) -> AliasHistory:
    """Read the moves of an alias as they are recorded, without completing or comparing anything."""
    params = retry(lambda: client.get_run(run_id), "the history").data.params
    records = {key: json.loads(text) for key, text in params.items() if re.fullmatch(re.escape(alias) + _RECORD, key)}
    moves = tuple(Move(**records[key], is_done=f"{key}.done" in params) for key in sorted(records))
    return AliasHistory(name=name, alias=alias, run_id=run_id, moves=moves)


def _follow(client: "MlflowClient", history: AliasHistory) -> AliasHistory:
    """Point MLflow's alias to the newest record's version, again while newer ones appear; return the history."""
    name, alias = history.name, history.alias
    while True:
        newest = read_recorded(client, history.run_id, name, alias)
        version = str(newest.version)
        if newest.version:
            _tag(client, name, alias, newest.moves[-1])
            _set(lambda version=version: client.set_registered_model_alias(name, alias, version), "the alias")
        else:
            retry(lambda: client.delete_registered_model_alias(name, alias), "the alias")
        if len(read_recorded(client, history.run_id, name, alias).moves) == len(newest.moves):
            _mark_done(client, history.run_id, alias, newest.moves[-1])
            return newest


def _mark_done(client: "MlflowClient", run_id: str, alias: str, move: Move) -> None:
    _write(client, run_id, f"{alias}.{move.number:06d}.done", "1")


def _write(client: "MlflowClient", run_id: str, key: str, value: str) -> bool:
    """Write a parameter once; return whether it has this value now. Of several writers exactly one gets True."""
    from mlflow.exceptions import MlflowException

    try:
        retry(lambda: client.log_param(run_id, key, value), "the history")
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE" or "Changing param values" not in str(error):
            raise
        return False
    return True


def _pointed_to(client: "MlflowClient", name: str, alias: str) -> int:
    found = or_none(lambda: client.get_model_version_by_alias(name, alias))
    return int(found.version) if found else 0


def _history_run(client: "MlflowClient", name: str) -> str:
    """Return the run that holds the model's history; create it once, whoever else does the same.

    All agree on it by a parameter of the run that made the model's first version.
    """
    known = registered_model(client, name).tags.get(HISTORY_TAG)
    if known:
        return known
    quoted = name.replace("'", "''")
    versions = retry(lambda: client.search_model_versions(f"name = '{quoted}'"), "the versions")
    first = min((v for v in versions if v.run_id), key=lambda v: int(v.version), default=None)
    if first is None:
        raise UserError(f"model {name} has no version that a run made; train one with `mae pretrain`")
    key = f"{HISTORY_TAG}.{name}"
    anchor = retry(lambda: client.get_run(first.run_id or ""), "the run")
    run_id = anchor.data.params.get(key)
    if run_id is None:
        tags = {"mae.kind": "history", "mae.model": name}
        made = retry(
            lambda: client.create_run(anchor.info.experiment_id, tags=tags, run_name=f"history-of-{name}"), "the run"
        )
        retry(lambda: client.set_terminated(made.info.run_id), "the run")
        run_id = made.info.run_id
        if not _write(client, anchor.info.run_id, key, run_id):
            retry(lambda: client.delete_run(made.info.run_id), "the run")
            run_id = retry(lambda: client.get_run(anchor.info.run_id), "the run").data.params[key]
    _set(lambda: client.set_registered_model_tag(name, HISTORY_TAG, run_id), "the history")
    return run_id


def _tag(client: "MlflowClient", name: str, alias: str, move: Move) -> None:
    """Write who moved the alias to this version, when, why and by which figures as tags of the version."""
    values = {
        "by": move.by, "at": move.at, "why": move.why, "kind": move.kind, "gate": move.gate, "run_id": move.run_id,
        "forced": str(move.forced).lower(), "figures": json.dumps(dict(move.figures)),
    }  # fmt: skip
    for key, value in values.items():
        tag = f"mae.{alias}.{key}"
        _set(lambda t=tag, v=value: client.set_model_version_tag(name, str(move.version), t, v), "the tags")


def _set(action: Callable[[], object], what: str) -> None:
    """Set an alias or a tag; again if MLflow fails since another process set it for the first time at the same moment.

    MLflow then looks, finds none, and inserts what the other inserted just before.
    """
    from mlflow.exceptions import MlflowException

    try:
        retry(action, what)
    except MlflowException as error:
        if not _SET_AT_ONCE.search(str(error)):
            raise
        retry(action, what)
