"""What lies at a URI: counts, sizes and classes of a prepared dataset or a source, and a sheet of samples."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pipelines.config import InspectConfig, PrepareConfig
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest
from pipelines.dataset.row_groups import RowGroups
from pipelines.images.decode import decode
from pipelines.pictures.contact_sheet import Tile, contact_sheet
from pipelines.prepare.quarantine import quarantined
from pipelines.prepare.slices import Tally, check_splits, class_names
from pipelines.sources import Entry, open_source
from pipelines.storage import Storage, open_storage, storage_of

_SHOWN_CLASSES = 1000


def inspect_uri(uri: str, config: InspectConfig) -> dict[str, Any]:
    """What is there, and the path of the sheet that was drawn of it. Raises UserError where nothing of ours is."""
    storage, (place, name) = open_storage(uri), storage_of(config.out)
    if is_prepared(storage):
        manifest = read_manifest(storage)
        found, tiles = _of_dataset(manifest), _dataset_tiles(storage, manifest, config)
        bad = [
            Tile(row["source"], row["reason"], row["head"]) for row in islice(quarantined(storage), config.num_images)
        ]
    else:
        found, tiles, bad = _of_source(uri, config)
    place.write(name, contact_sheet(uri, tiles, bad))
    return {"uri": uri, **found, "contact_sheet": place.join(name)}


def _of_dataset(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return {
        "kind": "prepared dataset",
        **manifest.summary,
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "num_shards": len(shards),
        "image_px": manifest.image_px,
        "mean": manifest.mean,
        "std": manifest.std,
    }


def _of_source(uri: str, config: InspectConfig) -> tuple[dict[str, Any], list[Tile], list[Tile]]:
    """What the listing says, and images drawn from it evenly, whole and not."""
    source, tally, sample = open_source(uri), Tally(), _Sample(config.num_images, config.seed)
    sizes: Counter[str] = Counter()
    with closing(source.entries()) as entries:  # pyright: ignore[reportArgumentType] -- a generator
        for entry in tally.counting(entries):
            sample.offer(entry)
            sizes[entry.label] += 1
    check_splits(tally, uri)
    classes = class_names(tally, source, PrepareConfig())
    chosen = sorted(sample.entries, key=lambda entry: entry.name)
    tiles: list[Tile] = []
    bad: list[Tile] = []
    for entry, content in zip(chosen, source.place.contents(chosen)):
        reason = str(content) if isinstance(content, ValueError) else _fault(content)
        encoded = b"" if isinstance(content, ValueError) else content
        (bad if reason else tiles).append(Tile(entry.name, reason or (entry.label if classes else ""), encoded))
    found = {
        "kind": "source",
        "num_found": tally.num_entries,
        "splits": {name or "train": folder.num_entries for name, folder in sorted(tally.folders.items())},
        "num_bytes": sum(folder.num_bytes for folder in tally.folders.values()),
        "num_classes": len(classes),
        "classes": {name: sizes[name] for name in classes[:_SHOWN_CLASSES]},
        "num_bad_of_sample": f"{len(bad)} of {len(chosen)}",
    }
    return found, tiles, bad


def _fault(content: bytes) -> str:
    try:
        decode(content, 3)
    except ValueError as error:
        return str(error)
    return ""


@dataclass
class _Sample:
    """Entries drawn from a stream of unknown length, each as likely as any other."""

    size: int
    seed: int

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self._seen, self._draw = 0, random.Random(self.seed)

    def offer(self, entry: Entry) -> None:
        self._seen += 1
        if len(self.entries) < self.size:
            self.entries.append(entry)
        elif (place := self._draw.randrange(self._seen)) < self.size:
            self.entries[place] = entry


def _dataset_tiles(storage: Storage, manifest: Manifest, config: InspectConfig) -> list[Tile]:
    """Images spread over all splits."""
    total = sum(split.num_rows for split in manifest.splits.values())
    wanted = np.unique(np.linspace(0, total - 1, min(config.num_images, total)).round().astype(np.int64))
    return list(_rows(storage, manifest, wanted.tolist()))


def _rows(storage: Storage, manifest: Manifest, wanted: Sequence[int]) -> Iterator[Tile]:
    columns, row_groups = ["image", "label", "source", "orientation"], RowGroups(storage.uri)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        rows = [i - shard.first_id for i in wanted if shard.first_id <= i < shard.first_id + shard.num_rows]
        for row in rows:
            group, place = divmod(row, shard.rows_per_group)
            found = row_groups.read(shard.path, group, columns).slice(place, 1).to_pylist()[0]
            label = "" if found["label"] is None else manifest.classes[found["label"]]
            yield Tile(found["source"], label, found["image"], found["orientation"])
