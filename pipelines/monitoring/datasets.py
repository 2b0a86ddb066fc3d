"""What became of the images of prepared datasets, and of those that are being prepared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.dataset.manifest import MANIFEST, read_manifest
from pipelines.storage import Storage, open_storage

_DONE = ".prepare/done"
"""Where a preparation keeps the summary of each slice until its manifest is written."""


@dataclass(frozen=True, kw_only=True)
class DatasetCounts:
    """Images by outcome: ok, quarantined, duplicate or passed_over."""

    dataset: str
    is_complete: bool
    num_images: Mapping[str, int]
    version: str = ""
    """Version of the manifest that was read."""
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Images read and quarantined of each slice whose summary was read, by path."""


def count_datasets(uri: str, known: Mapping[str, DatasetCounts] | None = None) -> list[DatasetCounts]:
    """Count the images of the dataset at the URI, or of each dataset in that folder.

    A manifest and summaries of slices that `known` has, by URI of the dataset, are not read again.
    """
    found = []
    root = open_storage(uri)
    is_one = root.exists(MANIFEST) or bool(root.list(_DONE))
    for name in [""] if is_one else sorted({path.split("/", 1)[0] for path, _ in root.walk() if "/" in path}):
        storage = open_storage(root.join(name)) if name else root
        if counts := _count(storage, (known or {}).get(storage.uri)):
            found.append(counts)
    return found


def _count(storage: Storage, known: DatasetCounts | None) -> DatasetCounts | None:
    """Return the counts of one dataset; None if the folder holds none."""
    if storage.exists(MANIFEST):
        version = storage.stat(MANIFEST).version
        if known and known.is_complete and known.version == version:
            return known
        manifest = read_manifest(storage)
        outcomes = {
            "ok": manifest.num_ok,
            "quarantined": manifest.num_quarantined,
            "duplicate": manifest.num_duplicates,
            "passed_over": sum(manifest.passed_over.values()),
        }
        return DatasetCounts(dataset=storage.uri, is_complete=True, num_images=outcomes, version=version)
    before = known.slices if known else {}
    slices = {path: before.get(path) or _read_slice(storage, path) for path, _ in storage.list(_DONE, suffix=".json")}
    if not slices:
        return None
    num_read, num_bad = (sum(counts[i] for counts in slices.values()) for i in (0, 1))
    outcomes = {"ok": num_read - num_bad, "quarantined": num_bad}
    return DatasetCounts(dataset=storage.uri, is_complete=False, num_images=outcomes, slices=slices)


def _read_slice(storage: Storage, path: str) -> tuple[int, int]:
    summary = json.loads(storage.read(path))
    return int(summary["num_entries"]), sum(summary["reasons"].values())
