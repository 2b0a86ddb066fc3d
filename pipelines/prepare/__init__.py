"""Convert a source to a prepared dataset: one Ray task per slice of the sorted listing, the manifest last.

The last slices, or all of a small source, are cut into pieces, so that every core has several tasks. A killed
preparation can be resumed: the same command processes only the slices and pieces that have no summary yet.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mae_core.errors import UserError
from pipelines.config import PrepareConfig, without_added_defaults
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest, write_manifest
from pipelines.interrupts import stopping_at
from pipelines.prepare.announcing import Announce, SlicePlace, TaskPool, WritingInOrder, first_epoch_order
from pipelines.prepare.assembly import assemble
from pipelines.prepare.duplicates import Duplicates, duplicates, relabelled
from pipelines.prepare.exclusions import Exclusions
from pipelines.prepare.holdout import bundled, with_held_out
from pipelines.prepare.kinds import NUM_EXAMINED, kind_of
from pipelines.prepare.passes import Passes
from pipelines.prepare.slices import (
    Slice,
    Tally,
    check_splits,
    class_names,
    consistent,
    cut,
    listing_digest,
    log_labels,
    numbers_of_labels,
)
from pipelines.prepare.tasks import SliceTasks
from pipelines.prepare.workfolder import WorkFolder
from pipelines.sources import Source, open_source
from pipelines.sources.passed_over import printable
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

# Of 1: less than masks of 0 and 15 of 255 have, and far less than photographs.
_MIN_STD, _MAX_DARK_MEAN = 0.03, 0.06

__all__ = ["Preparation", "SliceTasks", "begin", "prepare", "refuse_within"]


def prepare(source: str, out: str, config: PrepareConfig) -> Manifest:
    """Write the prepared dataset of `source` to `out`; return an existing one of the same source and config.

    An unreadable image is quarantined with its reason, of equal images one is kept, and what is no image is counted:
    found = ok + quarantined + duplicates + passed over. Images that `config.exclude` names do not count as found. The
    result depends on the listing, the bytes and the config, not on parallelism or earlier attempts.

    Raises UserError if the source has no readable image, too many bad ones, too much that would be passed over, or
    images both inside and outside split folders, or if `out` holds something else. Raises Interrupted, which says how
    many slices and pieces are done, after a signal.
    """
    begun = begin(source, out, config)
    if isinstance(begun, Manifest):
        return begun
    # Start Ray only when there is work: it takes seconds.
    from pipelines.cluster import ray_session

    with stopping_at(begun.progress), ray_session(None):
        found = begun.write()
    return begun.commit(found)


def begin(source: str, out: str, config: PrepareConfig) -> "Manifest | Preparation":
    """List `source` and claim `out` for its preparation; return the dataset if it is there already.

    Raises UserError as `prepare` does for what the listing shows.
    """
    target = open_storage(out)
    refuse_within(target, open_storage(source))
    origin = open_source(source, config, config.group_column)
    exclusions = Exclusions.read(config.exclude)
    with ExitStack() as stack:
        entries, tally = _listed(origin, exclusions, config, stack)
        exclusions.check(tally.num_entries, source)
        if not tally.num_entries:
            raise UserError(f"no image in {source}: its {origin.kind} are empty; give files that hold images")
        origin.passed_over.report(source)
        origin.passed_over.refuse_many(source, tally.num_entries, config.max_skipped)
        check_splits(tally, source)
        classes = class_names(tally, origin, config)
        log_labels(tally, origin, classes, config)
        number_of, label_sets = numbers_of_labels(tally, classes, config)
        identity = {
            "source_digest": listing_digest(consistent(entries, source)),
            "config": _identity(config, exclusions),
        }
        work = WorkFolder(target)
        if is_prepared(target):
            return _existing(target, identity, work)
        work.claim(identity)
        kind = kind_of(origin.place.contents(list(islice(iter(entries), NUM_EXAMINED))), config)
        parts: list[SlicePlace] = []
        work.put_slices(_noting_places(cut(entries, tally, number_of, config), parts))
    return Preparation(
        source=source,
        origin=origin,
        parts=parts,
        classes=classes,
        label_sets=label_sets,
        identity=identity,
        tasks=SliceTasks(work=work, target=target, place=origin.place, config=config, kind=kind),
    )


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A preparation that has claimed its target and written the listing of every slice."""

    source: str
    origin: Source
    parts: Sequence[SlicePlace]
    """Every slice, by number."""
    classes: list[str]
    label_sets: list[list[int]]
    identity: dict[str, Any]
    """What the dataset's manifest will say of the source and the config."""
    tasks: SliceTasks

    @property
    def num_found(self) -> int:
        return sum(part.num_entries for part in self.parts)

    def progress(self) -> str:
        """Say how many slices are done, and how many pieces of the others."""
        return _progress(self.tasks.work, len(self.parts))

    def write(self) -> Duplicates:
        """Write every slice, and again without duplicates; return these. Needs a session of Ray."""
        passes = Passes(self.tasks, self.num_found)
        passes.first_pass([part.num_entries for part in self.parts])
        return self._second_pass(passes)

    def write_in_order(self, announce: Announce, is_stopped: Callable[[], bool], pool: TaskPool) -> Duplicates:
        """Do as `write` does, and announce the slices in the order of a first epoch, each once it is final.

        Raises Stopped soon after `is_stopped` returns True, and UserError if a later slice changes what an announced
        one holds.
        """
        passes = Passes(self.tasks, self.num_found)
        order = first_epoch_order(self.parts)
        writing = WritingInOrder(order, self.tasks.work, self.tasks.config.drop_duplicates, pool, passes.count_bad)
        writing.run(announce, is_stopped)
        return self._second_pass(passes, {number: set(positions) for number, positions in writing.skipped.items()})

    def commit(self, found: Duplicates) -> Manifest:
        """Write the manifest and remove the work folder, once everything else is written."""
        work, config = self.tasks.work, self.tasks.config
        num_duplicates = sum(map(len, found.values()))
        pairs = relabelled(found, lambda number: work.slice(number).labels) if self.classes else []
        if pairs:
            (number, position), (kept, kept_position) = pairs[0]
            log.warning(
                "%d of %d duplicates have another label than the equal image that is kept, such as %s and %s, which "
                "stays",
                len(pairs), num_duplicates, printable(work.slice(number).entries[position].name),
                printable(work.slice(kept).entries[kept_position].name),
            )  # fmt: skip
        summaries = work.summaries(again=True)
        manifest = assemble(summaries, self.classes, self.identity, self.num_found, num_duplicates, config)
        if manifest.num_quarantined:
            log.warning("%d of %d images were quarantined", manifest.num_quarantined, manifest.num_found)
        for note, count in manifest.notes.items():
            log.info("%d of %d images: %s", count, manifest.num_found, note)
        _warn_of_splits(manifest, config)
        _warn_of_darkness(manifest)
        notes = manifest.notes | ({"duplicate of an image with another label": len(pairs)} if pairs else {})
        manifest = dataclasses.replace(manifest, label_sets=self.label_sets, notes=notes)
        beside = self.origin.passed_over.counts, list(self.origin.candidates.found)
        written = write_manifest(self.tasks.target, manifest.noting(*beside))
        work.remove()
        return written

    def _second_pass(self, passes: Passes, announced: Mapping[int, set[int]] | None = None) -> Duplicates:
        """Refuse what the first pass found, and drop duplicates. Raises UserError if others are `announced`."""
        passes.refuse_bad()
        passes.refuse_fraction(self.source)
        found = duplicates(self.tasks.work.summaries, self.num_found)
        if self.tasks.config.drop_duplicates:
            if announced is not None and announced != {number: set(positions) for number, positions in found.items()}:
                raise UserError(
                    f"equal images of {self.source} are in several splits by their content, which only the whole "
                    "source shows; run `mae prepare` first, and train on its result"
                )
            passes.second_pass(found)
        return found


def _listed(
    origin: Source, exclusions: Exclusions, config: PrepareConfig, stack: ExitStack
) -> tuple[SortedEntries, Tally]:
    """Return the sorted entries, with what is to be held out by class or group in split val, and their counts."""
    tally = Tally()
    listed = tally.counting(bundled(exclusions.applied(origin.entries()), config))
    entries = stack.enter_context(closing(SortedEntries(listed)))
    if config.hold_out == "content" and not config.group_by:
        return entries, tally
    check_splits(tally, origin.place.storage.uri)
    tally = Tally()
    held_out = tally.counting(with_held_out(entries, config))
    return stack.enter_context(closing(SortedEntries(held_out))), tally


def _warn_of_splits(manifest: Manifest, config: PrepareConfig) -> None:
    """Log that nothing was held out although something was to be."""
    by_content = config.hold_out == "content" and not config.group_by
    if by_content and config.val_fraction and "val" not in manifest.splits and "train" in manifest.splits:
        num = manifest.splits["train"].num_rows
        log.warning(
            "split val is empty: of %d images, no hash of the content chose one with val_fraction %g; to measure on "
            "val, prepare into another folder with --hold-out stratified or a higher --val-fraction",
            num, config.val_fraction,
        )  # fmt: skip


def _warn_of_darkness(manifest: Manifest) -> None:
    """Log that 8-bit images use a small part of 0 to 255, as masks of 0 and 1 do, or 4 bits in 8."""
    if not manifest.values and max(manifest.std) < _MIN_STD and max(manifest.mean) < _MAX_DARK_MEAN:
        log.warning(
            "the images are nearly black: their mean is %.1f of 255, with a standard deviation of %.1f; if they are "
            "masks, or have fewer than 8 bits, choose other images or add --range min-max",
            255 * max(manifest.mean), 255 * max(manifest.std),
        )  # fmt: skip


def _noting_places(parts: Iterable[Slice], places: list[SlicePlace]) -> Iterator[Slice]:
    """Yield the slices unchanged, and append what is known of each to `places`."""
    for part in parts:
        places.append(SlicePlace(num_entries=len(part.entries), folder=part.folder, holds_out=part.holds_out))
        yield part


def _progress(work: WorkFolder, num_slices: int) -> str:
    """Say how many slices are done, and how many pieces of the others."""
    done = work.done()
    num_pieces = sum(len(pieces) for number, pieces in work.pieces().items() if number not in done)
    more = f", and {num_pieces} piece{'s' * (num_pieces > 1)} of the others" if num_pieces else ""
    return f"stopped with {len(done)} of {num_slices} slices done{more}"


def refuse_within(target: Storage, source: Storage) -> None:
    """Raise UserError if `target` is inside `source`, where the next run would read it as part of the source."""
    inner, outer = (os.path.realpath(s.uri) if s.is_local else s.uri for s in (target, source))
    if target.is_local == source.is_local and inner.startswith(f"{outer.rstrip('/')}/"):
        raise UserError(f"{target.uri} is inside the source {source.uri}; choose a folder outside it")


def _identity(config: PrepareConfig, exclusions: Exclusions) -> dict[str, Any]:
    """Return the part of the config that determines the output bytes."""
    free = ("max_bad", "max_skipped", "exclude")
    values = {key: value for key, value in without_added_defaults(config).items() if key not in free}
    return values | exclusions.identity


def _existing(target: Storage, identity: dict[str, Any], work: WorkFolder) -> Manifest:
    """Return the dataset that is already there. Raises UserError if its source or config differs."""
    manifest = read_manifest(target)
    differing = [key for key, value in identity.items() if getattr(manifest, key) != value]
    if differing:
        what = " and ".join({"source_digest": "source", "config": "config"}[key] for key in differing)
        raise UserError(f"{target.uri} holds a dataset of another {what}; choose another folder, or empty it")
    if work.exists:
        work.remove()
    return manifest
