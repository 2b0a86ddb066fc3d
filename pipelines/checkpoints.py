"""A checkpoint is a folder of safetensors and JSON, committed by a manifest with their sha256 that is written last."""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from pipelines.storage import Storage

log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Training state after `step` optimizer steps: bytes of each file, and what describes them."""

    step: int
    files: dict[str, bytes]
    meta: dict[str, Any]


class CheckpointStore:
    """Checkpoints of one run under `prefix`; the only commit record, so resuming scans it."""

    def __init__(self, storage: Storage, prefix: str = "checkpoints") -> None:
        self._storage = storage
        self._prefix = prefix

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """The checkpoint is committed and all but the newest `keep` are gone."""
        folder = self._folder(checkpoint.step)
        for name, content in checkpoint.files.items():
            self._storage.write(f"{folder}/{name}", content)
        manifest = {
            "step": checkpoint.step,
            "meta": checkpoint.meta,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in checkpoint.files.items()},
        }
        self._storage.write(f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1, sort_keys=True).encode())
        for step in self.steps()[:-keep]:
            self._delete(step)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; their files are not yet verified."""
        found = []
        for path, _ in self._storage.list(self._prefix, suffix=f"/{_MANIFEST}"):
            name = path.split("/")[-2]
            if name.startswith("step-") and name[5:].isdigit():
                found.append(int(name[5:]))
        return sorted(found)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint after `step`, verified. Raises ValueError that names a missing or damaged file."""
        folder = self._folder(step)
        try:
            manifest = json.loads(self._storage.read(f"{folder}/{_MANIFEST}"))
            expected, meta = dict(manifest["sha256"]), dict(manifest["meta"])
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"{folder}/{_MANIFEST} is missing or damaged ({type(error).__name__})") from None
        files = {}
        for name, sha256 in expected.items():
            try:
                files[name] = self._storage.read(f"{folder}/{name}")
            except FileNotFoundError:
                raise ValueError(f"{folder}/{name} is missing") from None
            if hashlib.sha256(files[name]).hexdigest() != sha256:
                raise ValueError(f"{folder}/{name} is damaged: its sha256 differs from the manifest's")
        return Checkpoint(step=step, files=files, meta=meta)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are named in the log and passed over."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except ValueError as error:
                log.warning("checkpoint of step %d is passed over: %s", step, error)
        return None

    def latest_step(self) -> int:
        """Step of the newest whole checkpoint; 0 where there is none."""
        newest = self.latest()
        return newest.step if newest else 0

    def _folder(self, step: int) -> str:
        return f"{self._prefix}/step-{step:010d}"

    def _delete(self, step: int) -> None:
        """The manifest goes first, so that a deletion cut short leaves no checkpoint rather than half of one."""
        folder = self._folder(step)
        self._storage.delete(f"{folder}/{_MANIFEST}")
        for path, _ in self._storage.list(folder):
            self._storage.delete(path)
