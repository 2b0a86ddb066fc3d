"""Describe what a URI holds: counts, sizes and classes of a prepared dataset or a source, and a contact sheet."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mae_core.errors import UserError
from mae_core.normalization import Reading
from pipelines.config import InspectConfig
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest
from pipelines.dataset.row_groups import RowGroups
from pipelines.images.decode import ImageHeader, ValueArray, decode, inspect, read_values
from pipelines.images.decode.headers import MissingLibraryError
from pipelines.pictures.contact_sheet import Tile, contact_sheet
from pipelines.prepare.kinds import PLAIN, PixelKind, shown
from pipelines.prepare.quarantine import quarantined
from pipelines.prepare.slices import Tally, check_splits, class_names, consistent, log_labels, numbers_of_labels
from pipelines.prepare.values import Mask, ValueSums, levels_of
from pipelines.sources import Entry, open_source
from pipelines.sources.labels import members
from pipelines.sources.reading import Content
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import Storage, open_storage, storage_of

_NUM_SHOWN_CLASSES = 1000
_ANY = Reading(frames="first", fourth_band="band")
"""Reads every image that some options would take."""


def inspect_uri(uri: str, config: InspectConfig) -> dict[str, Any]:
    """Describe what the URI holds and write its contact sheet; return both facts and the sheet's path.

    Raises UserError if it holds neither a prepared dataset nor a source, or if a source lists an image twice with
    different labels.
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
        **({"values": dataclasses.asdict(manifest.values)} if manifest.values else {}),
    }


def _describe_source(uri: str, config: InspectConfig) -> tuple[dict[str, Any], list[Tile], list[Tile]]:
    """Return facts from the listing, and a uniform sample of its images: the readable ones and the bad ones."""
    source, tally, sample = open_source(uri, config), Tally(), _Sample(config.num_images, config.seed)
    with closing(SortedEntries(tally.counting(source.entries()))) as entries:
        for entry in consistent(entries, uri):
            sample.offer(entry)
    check_splits(tally, uri)
    classes = class_names(tally, source, config)
    log_labels(tally, source, classes, config)
    chosen = sorted(sample.entries, key=lambda entry: entry.name)
    looked = _Looked()
    for entry, content in zip(chosen, source.place.contents(chosen)):
        looked.add(entry, content, frozenset(classes))
    tiles, bad = looked.judged()
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
        "pixels": {shown(*kind): count for kind, count in looked.kinds.most_common()},
        "value_ranges": looked.value_ranges,
        "options_needed": looked.options_needed,
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


@dataclass
class _Looked:
    """What a look at the images of a sample found."""

    kinds: Counter[tuple[str, int]] = field(default_factory=Counter)
    options_needed: dict[str, str] = field(default_factory=dict)
    """Why `mae prepare` would quarantine images unless it is told how to read them, and by which option."""
    _sums: dict[tuple[str, int], ValueSums] = field(default_factory=dict)
    _found: list[tuple[Tile, ImageHeader]] = field(default_factory=list)
    _bad: list[Tile] = field(default_factory=list)

    def add(self, entry: Entry, content: Content, classes: frozenset[str]) -> None:
        """Read an image and count its values. Raises UserError if a library that reads it is missing."""
        try:
            if isinstance(content, ValueError):
                raise content
            header = self._counted(content)
        except MissingLibraryError as error:
            raise UserError(str(error)) from None
        except ValueError as error:
            self._bad.append(Tile(entry.name, str(error), b"" if isinstance(content, ValueError) else content))
            return
        label = "; ".join(name for name in members(entry.label) if name in classes)
        self._found.append((Tile(entry.name, label, content), header))

    def _counted(self, content: bytes) -> ImageHeader:
        """Count the values of an image, those of the middle one of several frames; return its header.

        Raises ValueError if it is damaged or needs an option, whose values are counted all the same.
        """
        try:
            header = inspect(content)
            self._count(header, *read_values(content))
            return header
        except MissingLibraryError:
            raise
        except ValueError as error:
            reason, _, remedy = str(error).partition(": ")
            with suppress(ValueError):
                header = inspect(content, reading=_ANY)
                self._count(header, *read_values(content, _ANY, header.num_frames // 2))
                self.options_needed.setdefault(reason, remedy)
            raise

    def _count(self, header: ImageHeader, values: ValueArray, valid: Mask | None) -> None:
        self.kinds[header.kind] += 1
        self._sums.setdefault(header.kind, ValueSums(dtype=values.dtype.name)).add(values, valid, None)

    def judged(self) -> tuple[list[Tile], list[Tile]]:
        """Return the images that `mae prepare` would take, those of the most frequent kind, and the others with why."""
        found, bad = [], list(self._bad)
        for tile, header in self._found:
            try:
                self._kind.check(header)
                if self._kind.is_plain and not header.is_plain:
                    decode(tile.content, 3)
                found.append(tile)
            except ValueError as error:
                bad.append(Tile(tile.name, str(error), tile.content))
        return found, bad

    @property
    def _kind(self) -> PixelKind:
        dtype, channels = self.kinds.most_common(1)[0][0] if self.kinds else (PLAIN.dtype, PLAIN.channels)
        is_plain = (dtype, channels) == (PLAIN.dtype, PLAIN.channels)
        return PixelKind(dtype=dtype, channels=channels, is_plain=is_plain)

    @property
    def value_ranges(self) -> list[dict[str, float]]:
        """Minimum, percentiles and maximum of each channel, over the images of the most frequent kind.

        Gray images count for every channel of colour ones.
        """
        if not self.kinds:
            return []
        sums = self._sums[self.kinds.most_common(1)[0][0]]
        levels, number = levels_of(sums.dtype), float if sums.dtype == "float32" else int
        return [
            {
                "min": number(channel.minimum),
                **{f"p{share}": number(channel.percentile(share, levels)) for share in (1, 99)},
                "max": number(channel.maximum),
            }
            if channel.counts.any()
            else {}
            for channel in sums.channels()
        ]


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
