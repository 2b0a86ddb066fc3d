"""Convert a source to a prepared dataset: one Ray task per slice of the sorted listing, the manifest last.

A killed preparation can be resumed: the same command processes only the slices that have no summary yet.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any

from mae_core.errors import UserError
from pipelines.config import ComputeConfig, PrepareConfig, without_added_defaults
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest, write_manifest
from pipelines.interrupts import stopping_at
from pipelines.prepare.assembly import assemble, total_values
from pipelines.prepare.duplicates import duplicates
from pipelines.prepare.exclusions import Exclusions
from pipelines.prepare.holdout import bundled, with_held_out
from pipelines.prepare.kinds import NUM_EXAMINED, PLAIN, PixelKind, kind_of
from pipelines.prepare.quarantine import MIN_BAD_TO_STOP, quarantined, refuse_bad
from pipelines.prepare.shards import write_slice
from pipelines.prepare.slices import (
    Tally,
    check_splits,
    class_names,
    cut,
    listing_digest,
    log_labels,
    numbers_of_labels,
)
from pipelines.prepare.values import refuse_empty, refuse_fraction
from pipelines.prepare.workfolder import WorkFolder
from pipelines.sources import Place, Source, open_source
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import Storage, open_storage
from pipelines.storage.retries import StoreUnavailableError

log = logging.getLogger(__name__)


def prepare(source: str, out: str, config: PrepareConfig) -> Manifest:
    """Write the prepared dataset of `source` to `out`; return an existing one of the same source and config.

    An unreadable image is quarantined with its reason, of equal images one is kept, and what is no image is counted:
    found = ok + quarantined + duplicates + passed over. Images that `config.exclude` names do not count as found. The
    result depends on the listing, the bytes and the config, not on parallelism or earlier attempts.

    Raises UserError if the source has no readable image, too many bad ones, too much that would be passed over, or
    images both inside and outside split folders, or if `out` holds something else. Raises Interrupted, which says how
    many slices are done, after a signal.
    """
    target = open_storage(out)
    refuse_within(target, open_storage(source))
    origin = open_source(source, config, config.group_column)
    exclusions = Exclusions.read(config.exclude)
    with ExitStack() as stack:
        entries, tally = _listed(origin, exclusions, config, stack)
        exclusions.check(tally.num_entries, source)
        origin.passed_over.report(source)
        origin.passed_over.refuse_many(source, tally.num_entries, config.max_skipped)
        check_splits(tally, source)
        classes = class_names(tally, origin, config)
        log_labels(tally, origin, classes, config)
        number_of, label_sets = numbers_of_labels(tally, classes, config)
        identity = {"source_digest": listing_digest(entries), "config": _identity(config, exclusions)}
        work = WorkFolder(target)
        if is_prepared(target):
            return _existing(target, identity, work)
        work.claim(identity)
        kind = kind_of(origin.place.contents(list(islice(iter(entries), NUM_EXAMINED))), config)
        num_slices = work.put_slices(cut(entries, tally, number_of, config))
    job = _Job(work, target, origin.place, config, kind, tally.num_entries)
    # Start Ray only when there is work: it takes seconds.
    from pipelines.cluster import ray_session

    with (
        stopping_at(lambda: f"stopped with {len(work.done())} of {num_slices} slices done"),
        ray_session(ComputeConfig()),
    ):
        job.first_pass(num_slices)
        job.refuse_bad()
        job.refuse_fraction(source)
        found = duplicates(work.summaries, tally.num_entries)
        if config.drop_duplicates:
            job.second_pass(found)
    num_duplicates = sum(map(len, found.values()))
    manifest = assemble(work.summaries(again=True), classes, identity, tally.num_entries, num_duplicates, config)
    if manifest.num_quarantined:
        log.warning("%d of %d images were quarantined", manifest.num_quarantined, manifest.num_found)
    for note, count in manifest.notes.items():
        log.info("%d of %d images: %s", count, manifest.num_found, note)
    _warn_of_splits(manifest, config)
    manifest = dataclasses.replace(manifest, label_sets=label_sets)
    written = write_manifest(target, manifest.noting(origin.passed_over.counts, list(origin.candidates.found)))
    work.remove()
    return written


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


class _Job:
    """The slices of one preparation, and the Ray tasks that write them."""

    def __init__(
        self,
        work: WorkFolder,
        target: Storage,
        place: Place,
        config: PrepareConfig,
        kind: PixelKind,
        num_found: int,
    ) -> None:
        self._work, self._target, self._place = work, target, place
        self._config, self._kind, self._num_found = config, kind, num_found

    def first_pass(self, num_slices: int) -> None:
        """Write every slice, duplicates included. Raises UserError early if too many images are bad."""
        done = self._work.done()
        if done:
            log.info("resuming: %d of %d slices are done", len(done), num_slices)
        todo = [{"number": number, "skip": []} for number in range(num_slices) if number not in done]
        num_bad = 0
        for counts in _run_tasks(todo, self._work, self._target, self._place, self._config, self._kind):
            num_bad += counts["num_bad"]
            if num_bad > MIN_BAD_TO_STOP:
                refuse_bad(self._target, num_bad, self._num_found, self._config.max_bad)

    def refuse_bad(self) -> None:
        """Raise UserError if no image is readable, or if more are bad than `max_bad` allows."""
        num_bad = 0
        reasons: dict[str, int] = {}
        for summary in self._work.summaries():
            num_bad += summary.num_bad
            for reason, count in summary.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + count
        if num_bad == self._num_found:
            first = next(quarantined(self._target))
            self._target.delete_tree()
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            raise UserError(
                f"no readable image among the {num_bad} files of {self._place.storage.uri} ({counts}); check them, "
                f"such as {first['source']} ({first['reason']})"
            )
        refuse_bad(self._target, num_bad, self._num_found, self._config.max_bad)

    def refuse_fraction(self, source: str) -> None:
        """Raise UserError if no value range is chosen where one is needed; the target is then empty again.

        It is also raised for a channel without data.
        """
        if self._kind.is_plain:
            return
        total, train = (total_values(self._work.summaries(), split) for split in (None, "train"))
        assert total is not None, "an image was read"
        try:
            refuse_empty(train or total, source, "training image" if train else "image")
            refuse_fraction(total, source, self._config)
        except UserError:
            # What is there was made with another config than what will be asked for.
            self._target.delete_tree()
            raise

    def second_pass(self, skip: dict[int, frozenset[int]]) -> None:
        """Rewrite every slice that holds duplicates, omitting those at positions `skip`."""
        done = self._work.done(again=True)
        todo = [{"number": n, "skip": sorted(skip[n])} for n in sorted(skip) if n not in done]
        if todo:
            self._work.begin_second_pass()
        for _ in _run_tasks(todo, self._work, self._target, self._place, self._config, self._kind):
            pass


def _run_tasks(
    todo: Sequence[dict[str, Any]],
    work: WorkFolder,
    target: Storage,
    place: Place,
    config: PrepareConfig,
    kind: PixelKind,
) -> Iterator[dict[str, int]]:
    """Run one Ray task per slice; yield their counts in order of completion."""
    if not todo:
        return
    import ray.data
    from ray.exceptions import RayError

    def write(row: dict[str, Any]) -> dict[str, int]:
        return prepare_slice(int(row["number"]), [int(i) for i in row["skip"]], work, target, place, config, kind)

    dataset = ray.data.from_items(list(todo), override_num_blocks=len(todo)).map(write)
    dataset.context.enable_progress_bars = False
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        raise unwrapped(error) from error


def prepare_slice(
    number: int,
    skip: list[int],
    work: WorkFolder,
    target: Storage,
    place: Place,
    config: PrepareConfig,
    kind: PixelKind = PLAIN,
) -> dict[str, int]:
    """Write one slice, omitting the entries at positions `skip`, and record its summary; return its counts."""
    summary = write_slice(work.slice(number), place, target, config, frozenset(skip), kind)
    if skip:
        kept = {shard.path for shard in summary.shards}
        for shard in work.summary(number).shards:
            if shard.path not in kept:
                target.delete(shard.path)
    work.put(summary, again=bool(skip))
    return {"number": number, "num_bad": summary.num_bad}


def unwrapped(error: BaseException) -> BaseException:
    """Unwrap Ray's error to the storage's own error, if there is one."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) in (OSError, StoreUnavailableError, PermissionError, FileNotFoundError, UserError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
