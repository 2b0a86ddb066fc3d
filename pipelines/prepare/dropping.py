"""Drop duplicates from the shards of a slice by copying the other rows, without decoding them again."""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator

from mae_core.errors import UserError
from pipelines.config import PrepareConfig
from pipelines.images.decode import decode, inspect
from pipelines.prepare.kinds import PLAIN, PixelKind
from pipelines.prepare.shards import rows_of, shard_writers, write_slice
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import DIGEST_BYTES, NO_SPLIT, PixelSums, SliceSummary
from pipelines.sources import SPLITS, Place
from pipelines.storage import Storage


class _ChangedError(Exception):
    """A dropped image is no longer the one that the first pass read."""


def drop_rows(
    part: Slice,
    skip: frozenset[int],
    first: SliceSummary,
    place: Place,
    out: Storage,
    config: PrepareConfig,
    kind: PixelKind = PLAIN,
) -> SliceSummary:
    """Rewrite the slice's shards without the images at positions `skip`; return the new summary.

    `first` is the summary of the first pass. The bytes are those that `write_slice` would write. It is called if a
    shard is not as the first pass left it, since a task that was killed may have rewritten one of two; and for images
    that are not plain, are cut into tiles or have notes, whose counts cannot be taken back exactly.
    """
    try:
        if not kind.is_plain or config.tile_px is not None or first.notes:
            raise _ChangedError
        summary = _copied(part, skip, first, place, out, config)
    except (_ChangedError, UserError, FileNotFoundError):
        summary = write_slice(part, place, out, config, skip, kind)
    kept = {shard.path for shard in summary.shards}
    for shard in first.shards:
        if shard.path not in kept:
            out.delete(shard.path)
    return summary


def _copied(
    part: Slice, skip: frozenset[int], first: SliceSummary, place: Place, out: Storage, config: PrepareConfig
) -> SliceSummary:
    summary = dataclasses.replace(first, shards=[], sums=copy.deepcopy(first.sums))
    # Of every dropped image an equal one is kept, so the sizes within the dataset stay.
    dropped = _subtract_dropped(summary, part, skip, place, config)
    shards = {shard.split: shard for shard in first.shards if shard.split not in dropped}
    with shard_writers(part, out, config) as writers:
        for shard in first.shards:
            if shard.split in dropped:
                for row, values in enumerate(rows_of(out, shard, config)):
                    if row not in dropped[shard.split]:
                        writers.add(shard.split, values)
        shards |= {shard.split: shard for shard in writers.close()}
    summary.shards = [shard for _, shard in sorted(shards.items())]
    return summary


def _subtract_dropped(
    summary: SliceSummary, part: Slice, skip: frozenset[int], place: Place, config: PrepareConfig
) -> dict[str, set[int]]:
    """Take the dropped images out of the pixel sums; return their rows by split."""
    rows = _rows_by_position(summary)
    positions = sorted(skip)
    dropped: dict[str, set[int]] = {}
    for position, content in zip(positions, place.contents([part.entries[i] for i in positions])):
        digest = summary.digests[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES]
        if isinstance(content, ValueError) or hashlib.sha256(content).digest()[:DIGEST_BYTES] != digest:
            raise _ChangedError
        header, sums = inspect(content, config.max_pixels), PixelSums()
        sums.add(decode(content, header.channels, header.orientation))
        split, row = rows[position]
        summary.sums[split].subtract(sums)
        dropped.setdefault(split, set()).add(row)
    return dropped


def _rows_by_position(summary: SliceSummary) -> dict[int, tuple[str, int]]:
    """Return split and row of each readable image, by its position in the slice."""
    return dict(_numbered(summary))


def _numbered(summary: SliceSummary) -> Iterator[tuple[int, tuple[str, int]]]:
    num_rows = dict.fromkeys(SPLITS, 0)
    for position, index in enumerate(summary.splits):
        if index != NO_SPLIT:
            split = SPLITS[index]
            yield position, (split, num_rows[split])
            num_rows[split] += 1
