"""Describe what a URI holds: counts, sizes and classes of a prepared dataset or a source, and a contact sheet."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config import InspectConfig
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest
from pipelines.dataset.row_groups import RowGroups
from pipelines.images.decode import decode, inspect
from pipelines.pictures.contact_sheet import Tile, contact_sheet
from pipelines.prepare.quarantine import quarantined
from pipelines.prepare.slices import Tally, check_splits, class_names, log_labels, numbers_of_labels
from pipelines.sources import Entry, open_source
from pipelines.sources.labels import members
from pipelines.sources.reading import Content
from pipelines.storage import Storage, open_storage, storage_of

_NUM_SHOWN_CLASSES = 1000


def inspect_uri(uri: str, config: InspectConfig) -> dict[str, Any]:
    """Describe what the URI holds and write its contact sheet; return both facts and the sheet's path.

    Raises UserError if it holds neither a prepared dataset nor a source.
    """
    storage, (output, name) = open_storage(uri), storage_of(config.out)
    if is_prepared(storage):
        manifest = read_manifest(storage)
        facts, tiles = _describe_dataset(manifest), _dataset_tiles(storage, manifest, config)
        bad = [
            Tile(row["source"], row["reason"], row["head"]) for row in islice(quarantined(storage), config.num_images)
        ]
    else:
        facts, tiles, bad = _describe_source(uri, config)
    output.write(name, contact_sheet(uri, tiles, bad))
    return {"uri": uri, **facts, "contact_sheet": output.join(name)}


def _describe_dataset(manifest: Manifest) -> dict[str, Any]:
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


def _describe_source(uri: str, config: InspectConfig) -> tuple[dict[str, Any], list[Tile], list[Tile]]:
    """Return facts from the listing, and a uniform sample of its images: the readable ones and the bad ones."""
    source, tally, sample = open_source(uri, config), Tally(), _Sample(config.num_images, config.seed)
    with closing(source.entries()) as entries:  # pyright: ignore[reportArgumentType] -- a generator
        for entry in tally.counting(entries):
            sample.offer(entry)
    check_splits(tally, uri)
    classes = class_names(tally, source, config)
    log_labels(tally, source, classes, config)
    chosen = sorted(sample.entries, key=lambda entry: entry.name)
    tiles, bad, ranges = _looked_at(chosen, list(source.place.contents(chosen)), frozenset(classes))
    passed, numbers = source.passed_over, numbers_of_labels(tally, classes, config)[0]
    labels = sum((folder.labels for folder in tally.folders.values()), Counter())
    num_labelled = sum(count for label, count in labels.items() if label in numbers)
    facts = {
        "kind": "source",
        "source_kind": source.kind,
        "num_found": tally.num_entries + passed.total,
        "num_images": tally.num_entries,
        "splits": {name or "train": folder.num_entries for name, folder in sorted(tally.folders.items())},
        "num_bytes": sum(folder.num_bytes for folder in tally.folders.values()),
        "num_classes": len(classes),
        "classes": _counted(tally, classes),
        "labels": config.labels if classes else "",
        "num_unlabelled": tally.num_entries - num_labelled,
        "label_candidates": dict(source.candidates.found),
        "passed_over": passed.counts,
        "passed_over_examples": {reason: passed.groups[reason].example for reason in sorted(passed.groups)},
        "value_ranges": ranges,
        "num_bad_of_sample": f"{len(bad)} of {len(chosen)}",
    }
    return facts, tiles, bad


def _counted(tally: Tally, classes: list[str]) -> dict[str, int]:
    """Return the number of images of each class, over all splits."""
    counts = Counter[str]()
    for folder in tally.folders.values():
        for label, count in folder.labels.items():
            counts.update(dict.fromkeys(members(label), count))
    return {name: counts[name] for name in classes[:_NUM_SHOWN_CLASSES]}


def _looked_at(
    entries: list[Entry], contents: list[Content], classes: frozenset[str]
) -> tuple[list[Tile], list[Tile], list[dict[str, float]]]:
    """Decode the images; return tiles of readable and of bad ones, and the range of each channel's values."""
    tiles: list[Tile] = []
    bad: list[Tile] = []
    values: list[NDArray[np.uint8]] = []
    for entry, content in zip(entries, contents):
        try:
            if isinstance(content, ValueError):
                raise content
            header = inspect(content)
            values.append(decode(content, header.channels, header.orientation))
            tiles.append(Tile(entry.name, "; ".join(c for c in members(entry.label) if c in classes), content))
        except ValueError as error:
            bad.append(Tile(entry.name, str(error), b"" if isinstance(content, ValueError) else content))
    return tiles, bad, _ranges(values)


def _ranges(images: Sequence[NDArray[np.uint8]]) -> list[dict[str, float]]:
    """Return minimum, percentiles and maximum of each channel over images [height width channels] as decoded to 8 bits.

    Gray images count for every channel.
    """
    if not images:
        return []
    channels = max(image.shape[2] for image in images)
    ranges = []
    for channel in range(channels):
        planes = [image[:, :, channel if image.shape[2] > 1 else 0] for image in images]
        counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in planes)
        levels, shares = np.flatnonzero(counts), np.cumsum(counts) / np.sum(counts)
        low, high = (int(np.searchsorted(shares, share)) for share in (0.01, 0.99))
        ranges.append({"min": int(levels[0]), "p1": low, "p99": high, "max": int(levels[-1])})
    return ranges


@dataclass
class _Sample:
    """A uniform random sample of a stream of unknown length (reservoir sampling)."""

    size: int
    seed: int

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self._seen, self._draw = 0, random.Random(self.seed)

    def offer(self, entry: Entry) -> None:
        self._seen += 1
        if len(self.entries) < self.size:
            self.entries.append(entry)
        elif (index := self._draw.randrange(self._seen)) < self.size:
            self.entries[index] = entry


def _dataset_tiles(storage: Storage, manifest: Manifest, config: InspectConfig) -> list[Tile]:
    """Return images spaced evenly over all splits."""
    total = sum(split.num_rows for split in manifest.splits.values())
    wanted = np.unique(np.linspace(0, total - 1, min(config.num_images, total)).round().astype(np.int64))
    return list(_rows(storage, manifest, wanted.tolist()))


def _rows(storage: Storage, manifest: Manifest, wanted: Sequence[int]) -> Iterator[Tile]:
    columns, row_groups = ["image", "label", "source", "orientation"], RowGroups(storage.uri)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        rows = [i - shard.first_id for i in wanted if shard.first_id <= i < shard.first_id + shard.num_rows]
        for row in rows:
            group, offset = divmod(row, shard.rows_per_group)
            values = row_groups.read(shard.path, group, columns).slice(offset, 1).to_pylist()[0]
            label = manifest.label_name(values["label"])
            yield Tile(values["source"], label or "", values["image"], values["orientation"])
