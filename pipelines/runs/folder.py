"""The folder that remembers a run: what it is, how far it has come, what it found, why it could not go on."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from mae_core.errors import UserError
from pipelines.runs.checkpoints import CheckpointStore
from pipelines.storage import Storage, open_storage

_SHOWN = 24
"""Characters of a value that an error shows."""


class RunFolder:
    """What one run leaves: run.json (what it is), config.json (how it is run), checkpoints/, metrics/, pictures/,
    export/, result.json when it is trained and outcome.json when it is published."""

    def __init__(self, uri: str) -> None:
        self.storage: Storage = open_storage(uri)
        self.checkpoints = CheckpointStore(self.storage)

    def result(self) -> dict[str, Any] | None:
        """What the finished run found; None while it is unfinished."""
        return json.loads(self.storage.read("result.json")) if self.storage.exists("result.json") else None

    def finish(self, result: dict[str, Any]) -> None:
        """The run counts as finished."""
        self.storage.write("result.json", json.dumps(result, indent=1).encode())

    def outcome(self) -> dict[str, Any] | None:
        """What the driver published after the run had finished; None until then."""
        return json.loads(self.storage.read("outcome.json")) if self.storage.exists("outcome.json") else None

    def remember(self, outcome: dict[str, Any]) -> None:
        """The run is published, and the same command will only print this."""
        self.storage.write("outcome.json", json.dumps(outcome, indent=1).encode())

    def described(self) -> dict[str, Any] | None:
        """What the run's driver claimed the folder with; None where there is no run."""
        return json.loads(self.storage.read("run.json")) if self.storage.exists("run.json") else None

    def claim(self, identity: dict[str, Any]) -> str:
        """The folder belongs to the run so described; returns the id that it has had since it was claimed first.

        Raises UserError where it belongs to another, or holds something else than a run.
        """
        found = self._described_or_empty()
        if found is not None:
            key = found.pop("id")
            differing = list(_differing(found, identity))
            if differing:
                raise UserError(
                    f"run folder {self.storage.uri} holds a run with another {', '.join(differing)}; only output, "
                    "name, data.uri, checkpoint, tracking and compute (but for precision) may change on resuming: "
                    "try another --name, or --fresh to replace it"
                )
            return key
        key = uuid.uuid4().hex
        self.storage.write("run.json", json.dumps({"id": key} | identity, indent=1, sort_keys=True).encode())
        return key

    def stop(self, cause: str) -> None:
        """The run cannot go on by itself, and the folder says why."""
        self.storage.write("stopped.json", json.dumps({"cause": cause}).encode())

    def stopped(self) -> str:
        """Why the run could not go on; empty where it can."""
        return json.loads(self.storage.read("stopped.json"))["cause"] if self.storage.exists("stopped.json") else ""

    def go_on(self) -> None:
        """What stopped the run is forgotten."""
        self.storage.delete("stopped.json")

    def request_restart(self, cause: str) -> None:
        """The group must be launched again, which counts as no failure."""
        self.storage.write("restart.json", json.dumps({"cause": cause}).encode())

    def restart_cause(self) -> str:
        """Why the group must be launched again; empty where it need not."""
        return json.loads(self.storage.read("restart.json"))["cause"] if self.storage.exists("restart.json") else ""

    def clear_restart_request(self) -> None:
        """The group is launched again."""
        self.storage.delete("restart.json")

    def failures(self) -> list[str]:
        """What ended a worker group of the run before its time, in order."""
        return [json.loads(self.storage.read(path))["cause"] for path, _ in self.storage.list("failures")]

    def name_failure(self, cause: str) -> None:
        """The folder says so of one more."""
        number = len(self.storage.list("failures"))
        self.storage.write(f"failures/{number:06d}.json", json.dumps({"time_s": time.time(), "cause": cause}).encode())

    def left_out(self) -> set[int]:
        """Steps, counted from 0, that must not be learnt from."""
        found = json.loads(self.storage.read("left_out.json")) if self.storage.exists("left_out.json") else []
        return {step for first, stop in found for step in range(first, stop)}

    def leave_out(self, steps: range) -> None:
        """These steps, too, will not be learnt from."""
        found = json.loads(self.storage.read("left_out.json")) if self.storage.exists("left_out.json") else []
        self.storage.write("left_out.json", json.dumps([*found, [steps.start, steps.stop]]).encode())

    def name_bad_step(self, step: int, sample_ids: list[int]) -> None:
        """The folder says which samples made up a step whose gradient was not finite."""
        self.storage.write(f"bad_steps/{step:010d}.json", json.dumps({"step": step, "ids": sample_ids}).encode())

    def clear(self) -> None:
        """Everything that the run left is gone; its results first and run.json last, so that nothing else is seen of a
        half-cleared run than that it is unfinished. Raises UserError where the folder holds something else than a run.
        """
        if self._described_or_empty() is None:
            return
        order = {"outcome.json": 0, "result.json": 0, "run.json": 2}
        for path in sorted((path for path, _ in self.storage.list()), key=lambda path: order.get(path, 1)):
            self.storage.delete(path)
        self.storage.delete_empty("")

    def _described_or_empty(self) -> dict[str, Any] | None:
        found = self.described()
        if found is None and not self.storage.is_empty():
            raise UserError(
                f"folder {self.storage.uri} holds something else than a run; try another --name or --output"
            )
        return found


def _differing(found: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the values that differ between two dicts of plain values, with both."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differing(found.get(key), wanted.get(key), f"{prefix}{key}.")
    elif found != wanted:
        there, here = (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..." for text in (str(found), str(wanted)))
        yield f"{prefix.removesuffix('.')} ({there} there, {here} here)"
