"""The record of one run: what it is, how far it got, what it found, and why it stopped.

    empty --claim--> claimed --mark_trained--> trained --mark_published--> published
                      |  ^                     (result.json)              (outcome.json)
         mark_stopped |  | clear_stop_reason, at the next launch
                      v  |
                     stopped (stopped.json)

Every state is a file, so that whoever opens the folder later reads it there. `claim` writes run.json. While the run is
claimed, its workers write checkpoints/, metrics/, evaluations/, pictures/, predictions/ and export/, and notes about
themselves:

- chosen.json: the compute options that it was last launched with, every auto replaced.
- listed.json, pixels.json: normalization of the first epoch, and of the others, of a run whose dataset was prepared
  meanwhile, and how many samples were expected.
- failures/: why a worker group ended early, one file each.
- restart.json: the driver must launch the group again, which counts as no failure.
- bad_steps/: the samples of every step whose gradient was not finite.
- left_out.json: ranges of steps that are skipped after a roll-back.
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from mae_core.errors import UserError
from pipelines.runs.checkpoints import CheckpointStore
from pipelines.storage import Storage, open_storage

_MAX_SHOWN_CHARS = 24
"""Longest text of a value in an error message."""


class RunFolder:
    """Read and write the state of one run. Any process may hold one; it keeps nothing in memory."""

    def __init__(self, uri: str) -> None:
        self.storage: Storage = open_storage(uri)
        self.checkpoints = CheckpointStore(self.storage)

    def claim(self, identity: dict[str, Any]) -> str:
        """Reserve the folder for the run with this identity; return the id that the run got when it was first claimed.

        Of several drivers that claim at once, one decides the id, and all get it. Raises UserError if the folder
        belongs to another run, or holds something other than a run.
        """
        found = self._identity_or_empty()
        if found is not None:
            key = found.pop("id")
            differing = list(_differing(found, identity))
            if differing:
                raise UserError(
                    f"run folder {self.storage.uri} holds a run with another {', '.join(differing)}; only output, "
                    "name, data.uri, checkpoint, tracking, evaluate and compute (but for precision) may change on "
                    f"resuming: try another --name, or --fresh to replace it{self._extending_hint(differing)}"
                )
            return key
        key = uuid.uuid4().hex
        content = json.dumps({"id": key} | identity, indent=1, sort_keys=True).encode()
        return key if self.storage.write_new("run.json", content) else self.claim(identity)

    def _extending_hint(self, differing: list[str]) -> str:
        """Return what to try if other epochs were asked of a finished run; empty otherwise."""
        asks_epochs = any(name.startswith("config.epochs ") for name in differing)
        if not asks_epochs or self.read_outcome() is None or (self.read_identity() or {}).get("kind") != "pretrain":
            return ""
        return f"; to train on after its end, `mae pretrain --extend {self.storage.uri} --epochs N`"

    def read_identity(self) -> dict[str, Any] | None:
        """Return the identity that the folder was claimed with, and the run's id; None if it holds no run."""
        return self._read("run.json")

    def write_pixels(self, pixels: dict[str, Any]) -> None:
        """Record the normalization of a run whose identity lacks it, since its dataset was not prepared yet."""
        self._write("pixels.json", pixels)

    def read_pixels(self) -> dict[str, Any]:
        """Return the normalization of a pretraining run."""
        return (self.read_identity() or {}).get("job", {}).get("pixels") or self._read("pixels.json")

    def write_listing(self, listing: dict[str, Any]) -> None:
        """Record what a first epoch is trained with while its dataset is being prepared."""
        self._write("listed.json", listing)

    def read_listing(self) -> dict[str, Any] | None:
        """Return what `write_listing` recorded; None if the dataset was prepared before, or nothing is trained yet."""
        return self._read("listed.json")

    def mark_trained(self, result: dict[str, Any]) -> None:
        """Record what the run found. Its workers have nothing left to do."""
        self._write("result.json", result)

    def read_result(self) -> dict[str, Any] | None:
        """Return what the run found; None until it is trained."""
        return self._read("result.json")

    def mark_published(self, outcome: dict[str, Any]) -> None:
        """Record what the driver published. From now on the same command only prints this outcome."""
        self._write("outcome.json", outcome)

    def read_outcome(self) -> dict[str, Any] | None:
        """Return the outcome of the run; None until it is published."""
        return self._read("outcome.json")

    def mark_stopped(self, reason: str) -> None:
        """Record why the run cannot continue without a change by the user."""
        self._write("stopped.json", {"cause": reason})

    def stop_reason(self) -> str:
        """Return why the run cannot continue; empty if it can."""
        return (self._read("stopped.json") or {"cause": ""})["cause"]

    def clear_stop_reason(self) -> None:
        """Let the run continue: a new launch tries again."""
        self.storage.delete("stopped.json")

    def request_restart(self, reason: str) -> None:
        """Ask the driver to launch the worker group again, which counts as no failure."""
        self._write("restart.json", {"cause": reason})

    def restart_reason(self) -> str:
        """Return why the group must be launched again; empty if it need not."""
        return (self._read("restart.json") or {"cause": ""})["cause"]

    def clear_restart_request(self) -> None:
        """Forget the request, just before the group is launched."""
        self.storage.delete("restart.json")

    def add_failure(self, cause: str) -> None:
        """Record one more early end of a worker group."""
        number = len(self.storage.list("failures"))
        self.storage.write(f"failures/{number:06d}.json", json.dumps({"time_s": time.time(), "cause": cause}).encode())

    def read_failures(self) -> list[str]:
        """Return the causes of all early ends of worker groups, in order."""
        return [json.loads(self.storage.read(path))["cause"] for path, _ in self.storage.list("failures")]

    def skip_steps(self, steps: range) -> None:
        """Add steps, counted from 0, whose samples are read but do not update the model."""
        ranges = self._read("left_out.json") or []
        self.storage.write("left_out.json", json.dumps([*ranges, [steps.start, steps.stop]]).encode())

    def read_skipped_steps(self) -> set[int]:
        """Return all steps, counted from 0, that must not update the model."""
        return {step for first, stop in self._read("left_out.json") or [] for step in range(first, stop)}

    def record_bad_step(self, step: int, sample_ids: list[int]) -> None:
        """Record the samples of a step whose gradient was not finite."""
        self.storage.write(f"bad_steps/{step:010d}.json", json.dumps({"step": step, "ids": sample_ids}).encode())

    def clear(self) -> None:
        """Delete everything that the run left, so that the folder is empty.

        Results go first and run.json last: a run whose deletion was interrupted is unfinished, and nothing else.
        Raises UserError if the folder holds something other than a run.
        """
        if self._identity_or_empty() is None:
            return
        order = {"outcome.json": 0, "result.json": 0, "run.json": 2}
        for path in sorted((path for path, _ in self.storage.list()), key=lambda path: order.get(path, 1)):
            self.storage.delete(path)
        self.storage.delete_empty("")

    def _identity_or_empty(self) -> dict[str, Any] | None:
        """Return the run's identity; None if the folder is empty. Raises UserError if it holds something else."""
        found = self.read_identity()
        if found is None and not self.storage.is_empty():
            # Another driver may have claimed the folder between the two requests.
            found = self.read_identity()
            if found is not None:
                return found
            raise UserError(
                f"folder {self.storage.uri} holds something else than a run; try another --name or --output"
            )
        return found

    def _read(self, name: str) -> Any:
        """Return the parsed JSON file; None if it does not exist."""
        return json.loads(self.storage.read(name)) if self.storage.exists(name) else None

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self.storage.write(name, json.dumps(values, indent=1).encode())


def _differing(found: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every value that differs between two dicts of plain values, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differing(found.get(key), wanted.get(key), f"{prefix}{key}.")
    elif found != wanted:
        there, here = (
            text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
            for text in (str(found), str(wanted))
        )
        yield f"{prefix.removesuffix('.')} ({there} there, {here} here)"
