"""Prepare a slice in pieces, by several tasks, and join them to the same bytes that one task would have written.

1. `cut_pieces` chooses the slices: the last ones, so that every core has several tasks and all end together.
2. A piece is a slice of its own, with shards, quarantine and summary in a folder of the work folder.
3. `join_pieces` copies the rows to the slice's shards in order. The price: these slices are written twice.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from pipelines.config import PrepareConfig
from pipelines.prepare.quarantine import Quarantine, quarantined
from pipelines.prepare.shards import rows_of, shard_writers
from pipelines.prepare.slices import Slice
from pipelines.prepare.summaries import SliceSummary
from pipelines.prepare.workfolder import WorkFolder
from pipelines.storage import Storage

TASKS_PER_CORE = 4
# A task costs some 20 ms; so many images take longer, however small they are.
_MIN_IMAGES = 32


def cut_pieces(
    sizes: Mapping[int, int], cores: int, done: Mapping[int, Sequence[range]], min_images: int = _MIN_IMAGES
) -> dict[int, list[range]]:
    """Choose which slices to prepare in pieces; return the pieces of each, as ranges of positions, in order.

    `sizes` has the number of entries of each slice that is to be prepared, and `done` the pieces of an earlier attempt,
    which are used whatever their length. While at least two slices a core remain, each of them is one task; the rest is
    cut, into at least four tasks a core unless pieces would have fewer than `min_images` entries.
    """
    num_whole = max(0, len(sizes) // cores - 1) * cores
    last = sorted(sizes)[num_whole:] if cores > 1 else []
    total = sum(sizes[number] for number in last)
    longest = max(min_images, -(-total // (TASKS_PER_CORE * cores)), 1)
    found = {}
    for number, size in sizes.items():
        if number in last or done.get(number):
            pieces = _pieces(size, longest if number in last else size, done.get(number, ()))
            if len(pieces) > 1 or done.get(number):
                found[number] = pieces
    return found


def _pieces(size: int, longest: int, done: Sequence[range]) -> list[range]:
    """Cover positions 0 to size - 1 by pieces that are done, and by new ones of even length between them."""
    found: list[range] = []
    start = 0
    while start < size:
        here = [piece for piece in done if piece.start == start]
        if here:
            found.append(max(here, key=len))
        else:
            length = min((piece.start for piece in done if piece.start > start), default=size) - start
            num_pieces = -(-length // longest)
            found.append(range(start, start + -(-length // num_pieces)))
        start = found[-1].stop
    return found


def part_of(whole: Slice, piece: range) -> Slice:
    """Return a slice of only these positions."""
    chosen = slice(piece.start, piece.stop)
    return dataclasses.replace(whole, entries=whole.entries[chosen], labels=whole.labels[chosen])


def join_pieces(
    part: Slice, pieces: Sequence[range], work: WorkFolder, out: Storage, config: PrepareConfig
) -> SliceSummary:
    """Write the shards and the quarantine file of a slice whose pieces are all done; return its summary."""
    summary = SliceSummary(number=part.number, num_entries=len(part.entries))
    quarantine = Quarantine()
    with shard_writers(part, out, config) as writers:
        for piece in pieces:
            folder, found = work.piece(part.number, piece), work.piece_summary(part.number, piece)
            for shard in found.shards:
                for values in rows_of(folder, shard, config):
                    writers.add(shard.split, values)
            quarantine.extend(quarantined(folder))
            summary.extend(found)
        summary.shards = writers.close()
    quarantine.write(out, part.quarantine)
    summary.reasons = quarantine.reasons
    return summary
