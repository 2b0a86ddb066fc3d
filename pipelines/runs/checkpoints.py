"""Checkpoints in a run folder: commit them atomically, verify them, prune old ones.

A checkpoint is a folder of safetensors files, committed by a manifest that states the sha256 of each.

1. Each file is written under a name that holds the beginning of its sha256. So a file left by a killed process or
   written by another driver is never mistaken for it.
2. The manifest is written last and never replaced. If two drivers commit the same step, one of them wins.
3. Pruning follows the commit. It deletes a manifest before the files, so that an interruption leaves no checkpoint.
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
# Pruning retries no longer than this: training may be waiting, and the next commit prunes again.
_PRUNE_RETRY_S = 10.0

# Content of one file as consecutive chunks, to avoid a copy in one piece.
Parts = Sequence[bytes | memoryview]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Training state after `step` optimizer steps."""

    step: int
    files: dict[str, bytes]
    """Content of each safetensors file, by name."""
    meta: dict[str, Any]
    """JSON values of the manifest, such as the run's id and the last metrics."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept when another one is committed: the union of three rules."""

    newest: int
    """Number of newest checkpoints."""
    best: int = 0
    """Number of checkpoints with the best score on val; if none has a score, with the lowest training loss."""
    every_steps: int | None = None
    """Steps between checkpoints that are kept permanently; None keeps none."""

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Return the steps to keep. `losses` has a value per checkpoint, lower is better; None if it is unknown."""
        steps = sorted(losses)
        found = set(steps[-self.newest :])
        known = sorted((loss, step) for step, loss in losses.items() if loss is not None and loss == loss)
        found.update(step for _, step in known[: self.best])
        if self.every_steps is not None:
            found.update(step for step in steps if step % self.every_steps == 0)
        return found


class CheckpointStore:
    """The checkpoints of one run under `prefix`. The manifests there are the only record of what is committed."""

    def __init__(self, storage: Storage, prefix: str = "checkpoints") -> None:
        self._storage = storage
        self._prefix = prefix
        self._losses: dict[int, float | None] = {}
        self._scores: dict[int, float | None] = {}

    def save(self, checkpoint: Checkpoint, retention: Retention) -> None:
        """Commit a checkpoint that is in memory as a whole, and prune old ones."""
        self.commit(
            checkpoint.step, {name: [content] for name, content in checkpoint.files.items()}, checkpoint.meta, retention
        )

    def commit(self, step: int, files: Mapping[str, Parts], meta: dict[str, Any], retention: Retention) -> None:
        """Commit a checkpoint of these files, unless an intact one of the step exists; then prune old ones.

        The call is idempotent: repeat it after an error. Raises OSError if the storage fails before the commit. If it
        fails while pruning, the error is logged and the next commit prunes again.
        """
        folder = self._folder(step)
        entries = {name: self._write(folder, name, parts) for name, parts in files.items()}
        manifest = json.dumps({"step": step, "meta": meta, "files": entries}, indent=1, sort_keys=True).encode()
        while not self._storage.write_new(f"{folder}/{_MANIFEST}", manifest):
            try:
                self.verify(step)
            except ValueError as error:
                log.warning("rewriting the checkpoint of step %d: %s", step, error)
                self._storage.delete(f"{folder}/{_MANIFEST}")
            else:
                log.info("the checkpoint of step %d is already committed; keeping it", step)
                break
        try:
            with retry_at_most(_PRUNE_RETRY_S):
                self._prune(retention)
        except OSError as error:
            log.warning("could not prune old checkpoints after step %d; retrying at the next one: %s", step, error)

    def record_score(self, step: int, score: float) -> None:
        """Store the score of the step's checkpoint, higher is better. Do nothing if the step has no checkpoint."""
        if step in self.steps():
            self._storage.write(f"{self._folder(step)}/{_SCORE}", json.dumps({"score": score}).encode())
            self._scores[step] = score

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, ascending, without checking their files."""
        return _steps_of(path for path, _ in self._storage.list(self._prefix, suffix=f"/{_MANIFEST}"))

    def load(self, step: int) -> Checkpoint:
        """Load and verify the checkpoint of `step`. Raises UserError that names a missing or damaged file."""
        entries, meta = self._manifest(step)
        return Checkpoint(step=step, files={name: self._read(step, name, entries[name]) for name in entries}, meta=meta)

    def verify(self, step: int) -> None:
        """Check that every file of the checkpoint has its sha256. Raises UserError that names one that has not."""
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
                log.warning("the checkpoint of step %d is skipped: %s", step, error)
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` values of the checkpoint. Raises UserError if its manifest is missing or damaged."""
        return self._manifest(step)[1]

    def _write(self, folder: str, name: str, parts: Parts) -> dict[str, Any]:
        """Write one file under a name that holds its sha256; return its entry in the manifest."""
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
        """Delete the checkpoints that `retention` does not keep, and uncommitted files of steps before the newest."""
        steps = self.steps()
        kept = retention.kept(self._ranking_losses(steps) if retention.best else dict.fromkeys(steps))
        for step in steps:
            if step not in kept:
                self._delete(step)
        newest = max(steps, default=0)
        for step in self._uncommitted(steps):
            if step < newest:
                self._delete(step)

    def _uncommitted(self, committed: Iterable[int]) -> set[int]:
        """Return the steps that have a folder but no manifest, as a killed process leaves them."""
        if self._storage.is_local:
            names = {entry.name for entry in Path(self._storage.join(self._prefix)).iterdir() if entry.is_dir()}
        else:
            names = {path.split("/")[-2] for path, _ in self._storage.list(self._prefix)}
        found = {int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()}
        return found - set(committed)

    def _ranking_losses(self, steps: Sequence[int]) -> dict[int, float | None]:
        """Return what to rank by, lower is better: negated scores if any checkpoint has one, else training losses."""
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
        """Return the training loss in the checkpoint's manifest; None if it has none or is damaged."""
        if step not in self._losses:
            try:
                last = self.meta(step).get("last")
                loss = last.get("train/loss") if isinstance(last, dict) else None
            except ValueError:
                loss = None
            self._losses[step] = None if loss is None else float(loss)
        return self._losses[step]

    def _delete(self, step: int) -> None:
        """Delete a checkpoint, manifest first, so that an interrupted deletion leaves none rather than half of one."""
        path = self._folder(step)
        self._storage.delete(f"{path}/{_MANIFEST}")
        folder = open_storage(self._storage.join(path))
        folder.delete_tree()
        if folder.is_local:
            with suppress(OSError):  # Another driver may be writing to the folder, or has removed it.
                Path(folder.uri).rmdir()


def _steps_of(paths: Iterable[str]) -> list[int]:
    """Return the steps, ascending, whose manifest is among these paths."""
    folders = (path.split("/")[-2] for path in paths if path.endswith(f"/{_MANIFEST}"))
    return sorted(int(name[5:]) for name in folders if name.startswith("step-") and name[5:].isdigit())
