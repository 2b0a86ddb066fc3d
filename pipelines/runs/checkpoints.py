"""A checkpoint is a folder of safetensors, committed by a manifest with their sha256 that is written last.

A file's name holds the beginning of its sha256: what a dead attempt or another driver leaves beside it is never taken
for it. The manifest is created, never replaced: of two drivers that commit the same step, one wins.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mae_core.errors import UserError
from pipelines.storage import Storage, open_storage
from pipelines.storage.retries import retry_at_most

log = logging.getLogger(__name__)

T = TypeVar("T")
_MANIFEST = "manifest.json"
_SCORE = "score.json"
# Training waits for nothing but the commit: a store that refuses the rest is left alone until the next.
_TIDYING_S = 10.0

# One file in parts, which a writer hashes and writes one after another.
Parts = Sequence[bytes | memoryview]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Training state after `step` optimizer steps: bytes of each file, and what describes them."""

    step: int
    files: dict[str, bytes]
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay when another is committed."""

    newest: int
    """So many of the newest."""
    best: int = 0
    """So many more of the best score on held-out images; of the lowest training loss where none has a score."""
    every_steps: int | None = None
    """Those of steps that are a multiple of this."""

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of checkpoints with these losses by step, the lower the better."""
        steps = sorted(losses)
        found = set(steps[-self.newest :])
        known = sorted((loss, step) for step, loss in losses.items() if loss is not None and loss == loss)
        found.update(step for _, step in known[: self.best])
        if self.every_steps is not None:
            found.update(step for step in steps if step % self.every_steps == 0)
        return found


class CheckpointStore:
    """Checkpoints of one run under `prefix`; the only commit record, so resuming scans it."""

    def __init__(self, storage: Storage, prefix: str = "checkpoints") -> None:
        self._storage = storage
        self._prefix = prefix
        self._losses: dict[int, float | None] = {}
        self._scores: dict[int, float | None] = {}

    def save(self, checkpoint: Checkpoint, retention: Retention) -> None:
        """The checkpoint is committed and those that need not stay are gone."""
        self.commit(
            checkpoint.step, {name: [content] for name, content in checkpoint.files.items()}, checkpoint.meta, retention
        )

    def commit(self, step: int, files: Mapping[str, Parts], meta: dict[str, Any], retention: Retention) -> None:
        """A checkpoint of these files is committed, unless a whole one of the step is there already.

        Nothing of it counts before its manifest is there. Raises OSError where the storage refuses; saying it again
        goes on from whatever was left. What need not stay is removed after that, now or with the next.
        """
        folder = self._folder(step)
        entries = {name: self._write(folder, name, parts) for name, parts in files.items()}
        manifest = json.dumps({"step": step, "meta": meta, "files": entries}, indent=1, sort_keys=True).encode()
        while not self._storage.write_new(f"{folder}/{_MANIFEST}", manifest):
            try:
                self.verify(step)
            except ValueError as error:
                log.warning("checkpoint of step %d is written again: %s", step, error)
                self._storage.delete(f"{folder}/{_MANIFEST}")
            else:
                log.info("checkpoint of step %d was committed before; that one stays", step)
                break
        try:
            with retry_at_most(_TIDYING_S):
                self._prune(retention)
        except OSError as error:
            log.warning("what need not stay beside the checkpoint of step %d is removed with the next: %s", step, error)

    def record_score(self, step: int, score: float) -> None:
        """The checkpoint of the step, if there is one, has this score, the higher the better."""
        if step in self.steps():
            self._storage.write(f"{self._folder(step)}/{_SCORE}", json.dumps({"score": score}).encode())
            self._scores[step] = score

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, ascending, without looking at their files."""
        return _steps_of(path for path, _ in self._storage.list(self._prefix, suffix=f"/{_MANIFEST}"))

    def load(self, step: int) -> Checkpoint:
        """The checkpoint after `step`, verified. Raises UserError that names a missing or damaged file."""
        entries, meta = self._manifest(step)
        return Checkpoint(step=step, files={name: self._read(step, name, entries[name]) for name in entries}, meta=meta)

    def verify(self, step: int) -> None:
        """Every file of the checkpoint is there with its sha256. Raises UserError that names one that is not."""
        entries, _ = self._manifest(step)
        for name, entry in entries.items():
            self._read(step, name, entry)

    def latest(self) -> Checkpoint | None:
        """Load the newest intact checkpoint, reading each file once; None without one. Log the damaged ones."""
        return self._newest(self.steps(), self.load)

    def latest_intact_step(self) -> int:
        """Return the step of the newest intact checkpoint, 0 without one; hold one file in memory at a time."""

        def intact(step: int) -> int:
            self.verify(step)
            return step

        return self._newest(self.steps(), intact) or 0

    def latest_step(self) -> int:
        """Return the step of the newest complete checkpoint, 0 without one; read no file but manifests.

        Complete means that every file is present in the size that the manifest states. Its contents may be damaged.
        """
        sizes = dict(self._storage.list(self._prefix))

        def complete(step: int) -> int:
            for name, entry in self._manifest(step)[0].items():
                path = f"{self._folder(step)}/{entry['path']}"
                if sizes.get(path) != entry["bytes"]:
                    found = f"has {sizes[path]} bytes" if path in sizes else "is missing"
                    raise UserError(f"{path} {found}; the manifest states {entry['bytes']} bytes for {name}")
            return step

        return self._newest(_steps_of(sizes), complete) or 0

    def discard(self, step: int) -> None:
        """Delete the manifest of a damaged checkpoint, so that the one before it is the newest.

        Its files are deleted when a later checkpoint is committed.
        """
        self._storage.delete(f"{self._folder(step)}/{_MANIFEST}")

    def _newest(self, steps: Sequence[int], check: Callable[[int], T]) -> T | None:
        """Return `check` of the last of these steps for which it raises no UserError; None if there is none."""
        for step in reversed(steps):
            try:
                return check(step)
            except UserError as error:
                log.warning("checkpoint of step %d is skipped: %s", step, error)
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What describes the checkpoint. Raises UserError where its manifest is missing or damaged."""
        return self._manifest(step)[1]

    def _write(self, folder: str, name: str, parts: Parts) -> dict[str, Any]:
        """The file is durable under a name that its content decides; returns what the manifest says of it."""
        digest, num_bytes = hashlib.sha256(), 0
        for part in parts:
            digest.update(part)
            num_bytes += memoryview(part).nbytes
        sha256 = digest.hexdigest()
        path = f"{Path(name).stem}-{sha256[:16]}{Path(name).suffix}"
        with self._storage.create(f"{folder}/{path}") as file:
            for part in parts:
                file.write(part)
        return {"path": path, "sha256": sha256, "bytes": num_bytes}

    def _manifest(self, step: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        path = f"{self._folder(step)}/{_MANIFEST}"
        try:
            manifest = json.loads(self._storage.read(path))
            entries = {
                name: {"path": str(e["path"]), "sha256": str(e["sha256"]), "bytes": int(e["bytes"])}
                for name, e in manifest["files"].items()
            }
            return entries, dict(manifest["meta"])
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise UserError(f"{path} is missing or damaged ({type(error).__name__})") from None

    def _read(self, step: int, name: str, entry: dict[str, Any]) -> bytes:
        path = f"{self._folder(step)}/{entry['path']}"
        try:
            content = self._storage.read(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise UserError(f"{path} is damaged: its sha256 differs from the manifest's for {name}")
        return content

    def _folder(self, step: int) -> str:
        return f"{self._prefix}/step-{step:010d}"

    def _prune(self, retention: Retention) -> None:
        """Checkpoints that need not stay are gone, and so is what attempts that died before a kept one left."""
        steps = self.steps()
        kept = retention.kept(self._badness(steps) if retention.best else dict.fromkeys(steps))
        for step in steps:
            if step not in kept:
                self._delete(step)
        newest = max(steps, default=0)
        for step in self._uncommitted(steps):
            if step < newest:
                self._delete(step)

    def _uncommitted(self, committed: Iterable[int]) -> set[int]:
        """Steps whose folder is there, if only with what a killed process left, but has no manifest."""
        if self._storage.is_local:
            names = {entry.name for entry in Path(self._storage.join(self._prefix)).iterdir() if entry.is_dir()}
        else:
            names = {path.split("/")[-2] for path, _ in self._storage.list(self._prefix)}
        found = {int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()}
        return found - set(committed)

    def _badness(self, steps: Sequence[int]) -> dict[int, float | None]:
        """What the best are chosen by: scores, where any checkpoint has one, or training losses."""
        scores = {step: score for step in steps if (score := self._score(step)) is not None}
        if scores:
            return {step: -scores[step] if step in scores else None for step in steps}
        return {step: self._loss(step) for step in steps}

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                self._scores[step] = float(json.loads(self._storage.read(f"{self._folder(step)}/{_SCORE}"))["score"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                self._scores[step] = None
        return self._scores[step]

    def _loss(self, step: int) -> float | None:
        """The loss that the checkpoint was saved with; None where it says none or says nothing."""
        if step not in self._losses:
            try:
                last = self.meta(step).get("last")
                loss = last.get("train/loss") if isinstance(last, dict) else None
            except ValueError:
                loss = None
            self._losses[step] = None if loss is None else float(loss)
        return self._losses[step]

    def _delete(self, step: int) -> None:
        """The manifest goes first, so that a deletion cut short leaves no checkpoint rather than half of one."""
        folder = self._folder(step)
        self._storage.delete(f"{folder}/{_MANIFEST}")
        place = open_storage(self._storage.join(folder))
        place.delete_tree()
        if place.is_local:
            with suppress(OSError):  # another driver writes into it, or has removed it
                Path(place.uri).rmdir()


def _steps_of(paths: Iterable[str]) -> list[int]:
    """Return the steps, ascending, whose manifest is among these paths."""
    folders = (path.split("/")[-2] for path in paths if path.endswith(f"/{_MANIFEST}"))
    return sorted(int(name[5:]) for name in folders if name.startswith("step-") and name[5:].isdigit())
