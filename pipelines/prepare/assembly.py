"""Combine the summaries of all slices into the manifest."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import SCHEMA, VALUES_SCHEMA, Manifest, Shard, Split
from pipelines.prepare.summaries import PixelSums, SliceSummary
from pipelines.prepare.values import ValueSums, described
from pipelines.sources import SPLITS


def assemble(
    summaries: Iterable[SliceSummary],
    classes: list[str],
    identity: dict[str, Any],
    num_found: int,
    num_duplicates: int,
    config: PrepareConfig,
) -> Manifest:
    """Return the manifest for the slices, given in order: found = ok + quarantined + duplicates, dropped or not."""
    ordered = [_without_digests(summary) for summary in summaries]
    splits = _splits(ordered, config.rows_per_group)
    num_rows = sum(split.num_rows for split in splits.values())
    num_files = num_rows - sum(s.num_further for s in ordered)
    num_ok = num_files if config.drop_duplicates else num_files - num_duplicates
    reasons = sum((Counter(s.reasons) for s in ordered), Counter())
    sizes = {size for s in ordered for size in s.sizes}
    in_colour = any(sums.num_colour for s in ordered for sums in s.sums.values())
    counted, values = "train" if "train" in splits else None, None
    if total := total_values(ordered):
        values, mean, std = described(total_values(ordered, counted) or total, config)
        mean, std, channels = _repeated(mean, std, max(total.by_channels))
    else:
        mean, std = _statistics(ordered, counted, in_colour)
        channels = 3 if in_colour else 1
    assert num_found == num_ok + reasons.total() + num_duplicates, "every file that was found is accounted for"
    return Manifest(
        channels=channels,
        image_px=sizes.pop() if len(sizes) == 1 else None,
        classes=classes,
        splits=splits,
        num_found=num_found,
        num_ok=num_ok,
        num_quarantined=reasons.total(),
        num_duplicates=num_duplicates,
        quarantine_reasons=dict(sorted(reasons.items())),
        mean=mean,
        std=std,
        values=values,
        notes=dict(sorted(sum((Counter(s.notes) for s in ordered), Counter()).items())),
        num_unlabelled=_unlabelled(ordered) if classes else {},
        schema=VALUES_SCHEMA if values else SCHEMA,
        **identity,
    )


def total_values(summaries: Iterable[SliceSummary], split: str | None = None) -> ValueSums | None:
    """Return the sums over one split, or over all, of images that are not plain; None if there are none."""
    total: ValueSums | None = None
    for sums in (sums for s in summaries for name, sums in s.values.items() if split in (None, name)):
        total = total or ValueSums(dtype=sums.dtype)
        total.merge(sums)
    return total


def _repeated(mean: list[float], std: list[float], channels: int) -> tuple[list[float], list[float], int]:
    """Return statistics of gray training images for each channel, if other splits have colour."""
    return (mean * channels, std * channels, channels) if len(mean) == 1 else (mean, std, channels)


def _splits(ordered: Sequence[SliceSummary], rows_per_group: int) -> dict[str, Split]:
    splits, first_id = {}, 0
    for name in SPLITS:
        shards = []
        for written in (shard for s in ordered for shard in s.shards if shard.split == name):
            shards.append(
                Shard(
                    path=written.path,
                    num_rows=written.num_rows,
                    num_bytes=written.num_bytes,
                    first_id=first_id,
                    sha256=written.sha256,
                    rows_per_group=rows_per_group,
                )
            )
            first_id += written.num_rows
        if shards:
            rows, size = sum(s.num_rows for s in shards), sum(s.num_bytes for s in shards)
            splits[name] = Split(num_rows=rows, num_bytes=size, shards=shards)
    return splits


def _unlabelled(ordered: Sequence[SliceSummary]) -> dict[str, int]:
    """Return the number of images without a label by split, where there are any."""
    counts: Counter[str] = Counter()
    for written in (shard for s in ordered for shard in s.shards):
        counts[written.split] += written.num_unlabelled
    return {name: count for name, count in sorted(counts.items()) if count}


def _statistics(ordered: Sequence[SliceSummary], split: str | None, in_colour: bool) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel over one split, or over all."""
    total = PixelSums()
    for sums in (sums for s in ordered for name, sums in s.sums.items() if split in (None, name)):
        total.merge(sums)
    mean, std = total.mean_std()
    return (mean * 3, std * 3) if in_colour and len(mean) == 1 else (mean, std)


def _without_digests(summary: SliceSummary) -> SliceSummary:
    """Drop the large fields, which the manifest does not need."""
    return dataclasses.replace(summary, splits=bytearray(), digests=bytearray())
