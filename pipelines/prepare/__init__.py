"""Images become a prepared dataset: one Ray task a slice of the sorted listing, the manifest last.

What is done stays done: killed at any moment, the same command goes on with the slices that have no summary yet.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from mae_core.errors import UserError
from pipelines.config import ComputeConfig, PrepareConfig, to_dict
from pipelines.dataset.manifest import Manifest, is_prepared, read_manifest, write_manifest
from pipelines.prepare.assembly import assemble
from pipelines.prepare.duplicates import duplicates
from pipelines.prepare.quarantine import quarantined
from pipelines.prepare.shards import write_slice
from pipelines.prepare.slices import Tally, check_splits, class_names, cut, listing_digest
from pipelines.prepare.workfolder import WorkFolder
from pipelines.sources import Place, open_source
from pipelines.sources.sorting import SortedEntries
from pipelines.storage import Storage, open_storage
from pipelines.storage.retries import StoreUnavailableError

log = logging.getLogger(__name__)

# A job with fewer bad images runs to its end before it is judged.
_JUDGED_EARLY_FROM = 100
_SHOWN = 20


def prepare(source: str, out: str, config: PrepareConfig) -> Manifest:
    """`out` holds the prepared dataset of the images of `source`; what was prepared alike before is returned as is.

    An image that cannot be read is quarantined with its reason, one that occurs twice is kept once: found = ok +
    quarantined + duplicates. The result depends on the listing, the bytes and the config, not on parallelism or on
    earlier attempts. Raises UserError where the source has no (readable) image, too many bad ones, or mixes split
    folders with others, or where `out` holds something else.
    """
    target = open_storage(out)
    _refuse_within(target, open_storage(source))
    origin = open_source(source)
    tally = Tally()
    with closing(SortedEntries(tally.counting(origin.entries()))) as entries:
        check_splits(tally, source)
        classes = class_names(tally, origin, config)
        identity = {"source_digest": listing_digest(entries), "config": _identity(config)}
        work = WorkFolder(target)
        if is_prepared(target):
            return _already(target, identity, work)
        work.claim(identity)
        num_slices = work.put_slices(cut(entries, tally, classes, config))
    job = _Job(work, target, origin.place, config, tally.num_entries)
    # Not before there is something to do: Ray takes seconds.
    from pipelines.cluster import ray_session

    with ray_session(ComputeConfig()):
        job.first_pass(num_slices)
        job.refuse_bad()
        repeated = duplicates(work.summaries, tally.num_entries)
        if config.drop_duplicates:
            job.second_pass(repeated)
    num_duplicates = sum(map(len, repeated.values()))
    manifest = assemble(work.summaries(again=True), classes, identity, tally.num_entries, num_duplicates, config)
    if manifest.num_quarantined:
        log.warning("%d of %d images are in quarantine", manifest.num_quarantined, manifest.num_found)
    written = write_manifest(target, manifest)
    work.remove()
    return written


def _refuse_within(target: Storage, source: Storage) -> None:
    """Raises UserError where what is written would be taken for a part of the source the next time."""
    inner, outer = (os.path.realpath(s.uri) if s.is_local else s.uri for s in (target, source))
    if target.is_local == source.is_local and inner.startswith(f"{outer.rstrip('/')}/"):
        raise UserError(f"{target.uri} lies within the source {source.uri}; choose a place beside it")


def _identity(config: PrepareConfig) -> dict[str, Any]:
    """What of the config decides the bytes."""
    return {key: value for key, value in to_dict(config).items() if key != "max_bad"}


def _already(target: Storage, identity: dict[str, Any], work: WorkFolder) -> Manifest:
    manifest = read_manifest(target)
    differing = [key for key, value in identity.items() if getattr(manifest, key) != value]
    if differing:
        what = " and ".join({"source_digest": "source", "config": "config"}[key] for key in differing)
        raise UserError(f"{target.uri} holds a dataset of another {what}; choose another folder, or empty it")
    if work.exists:
        work.remove()
    return manifest


class _Job:
    """The slices of one preparation, and what Ray has still to do of them."""

    def __init__(self, work: WorkFolder, target: Storage, place: Place, config: PrepareConfig, num_found: int) -> None:
        self._work, self._target, self._place = work, target, place
        self._config, self._num_found = config, num_found

    def first_pass(self, num_slices: int) -> None:
        """Every slice is written, duplicates and all. Ends early where too many images are bad already."""
        done = self._work.done()
        if done:
            log.info("going on: %d of %d slices were done before", len(done), num_slices)
        num_bad = 0
        for found in self._run([{"number": number, "skip": []} for number in range(num_slices) if number not in done]):
            num_bad += found["num_bad"]
            if num_bad > max(_JUDGED_EARLY_FROM, self._config.max_bad * self._num_found):
                self._refuse(num_bad)

    def refuse_bad(self) -> None:
        """Raises UserError where no image is whole, or more are bad than `max_bad` allows."""
        num_bad = 0
        reasons: dict[str, int] = {}
        for summary in self._work.summaries():
            num_bad += summary.num_bad
            for reason, count in summary.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + count
        if num_bad == self._num_found:
            self._target.delete_tree()
            said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            raise UserError(
                f"no readable image among the {num_bad} files of {self._place.storage.uri} ({said}); check the files"
            )
        if num_bad > self._config.max_bad * self._num_found:
            self._refuse(num_bad)

    def _refuse(self, num_bad: int) -> None:
        shown = [f"{row['source']} ({row['reason']})" for row, _ in zip(quarantined(self._target), range(_SHOWN))]
        more = f", and {num_bad - len(shown)} more in {self._target.join('quarantine')}" if num_bad > _SHOWN else ""
        raise UserError(
            f"{num_bad} of {self._num_found} images are bad, more than max_bad {self._config.max_bad:g} allows: "
            f"{', '.join(shown)}{more}; mend or remove them, or go on with a larger --max-bad"
        )

    def second_pass(self, repeated: dict[int, frozenset[int]]) -> None:
        """Every slice that holds duplicates is written again without them."""
        done = self._work.done(again=True)
        todo = [
            {"number": number, "skip": sorted(repeated[number])} for number in sorted(repeated) if number not in done
        ]
        if todo:
            self._work.begin_second_pass()
        for _ in self._run(todo):
            pass

    def _run(self, todo: Sequence[dict[str, Any]]) -> Iterator[dict[str, int]]:
        if todo:
            yield from _run(todo, self._work, self._target, self._place, self._config)


def _run(
    todo: Sequence[dict[str, Any]], work: WorkFolder, target: Storage, place: Place, config: PrepareConfig
) -> Iterator[dict[str, int]]:
    """Every slice is written by one Ray task; their counts, as they end."""
    import ray.data
    from ray.exceptions import RayError

    def write(row: dict[str, Any]) -> dict[str, int]:
        return write_one(int(row["number"]), [int(place) for place in row["skip"]], work, target, place, config)

    dataset = ray.data.from_items(list(todo), override_num_blocks=len(todo)).map(write)
    dataset.context.enable_progress_bars = False
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        raise _user_error(error) from error


def write_one(
    number: int, skip: list[int], work: WorkFolder, target: Storage, place: Place, config: PrepareConfig
) -> dict[str, int]:
    """The slice is done, without the entries to skip; what it comes to."""
    summary = write_slice(work.slice(number), place, target, config, frozenset(skip))
    if skip:
        kept = {shard.path for shard in summary.shards}
        for shard in work.summary(number).shards:
            if shard.path not in kept:
                target.delete(shard.path)
    work.put(summary, again=bool(skip))
    return {"number": number, "num_bad": summary.num_bad}


def _user_error(error: BaseException) -> BaseException:
    """The storage's own error under Ray's wrapping, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) in (OSError, StoreUnavailableError, PermissionError, FileNotFoundError, UserError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
