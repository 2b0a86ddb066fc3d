"""`mae pretrain --data.cache`: prepare a source while the first epoch trains on what is prepared already.

1. The source is listed and the cache claimed, as by `mae prepare`.
2. In one session of Ray, a thread of this process prepares slices in the order of the first epoch and announces each
   once it is final. A worker group trains on what is announced, in that order (`pipelines.feed.listing`), and ends with
   a checkpoint after the first epoch.
3. Now the cache holds a prepared dataset. The run goes on from that checkpoint as any other on it (`drive`).

So nothing but the first epoch differs from a run on a dataset that was prepared before: the order of its samples, the
normalization, which is that of the first training slice, and its learning rate, which is that of an epoch of as many
samples as the listing lets expect. The price is one more start of the workers.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.cluster import machine, ray_address, ray_session, task_limit
from pipelines.config import PrepareConfig, PretrainConfig, from_dict, run_name, to_dict
from pipelines.dataset.manifest import Manifest, is_prepared
from pipelines.drivers.drive import PublishedJob, claim, drive, keep_compiled, mark_ended, shown_config
from pipelines.drivers.launch import RunFailed, launch
from pipelines.drivers.preparing_thread import Preparing
from pipelines.drivers.pretrain import (
    StartingWeights,
    on_dataset,
    open_dataset,
    pretrain,
    published_pretrain_job,
    with_starting_weights,
)
from pipelines.feed.listing import Announcements, announce_all
from pipelines.interrupts import stopping_at
from pipelines.prepare import Preparation, begin
from pipelines.prepare.announcing import RayTaskPool, num_trained_on
from pipelines.prepare.summaries import SliceSummary
from pipelines.registry import Tracking
from pipelines.runs.automatic import describe_compute, settle
from pipelines.runs.folder import RunFolder
from pipelines.runs.followers import MetricFollower
from pipelines.runs.jobs import PretrainJob
from pipelines.runs.listing import Heartbeat, last_alive_s
from pipelines.runs.plans import ListedDataset, train_plan
from pipelines.runs.progress import ProgressDisplay
from pipelines.runs.stopping import StopRequest
from pipelines.runs.trackers import check_installed, tracking_elsewhere
from pipelines.storage import open_storage

log = logging.getLogger(__name__)


def pretrain_while_preparing(
    config: PretrainConfig, preset: str, *, fresh: bool, stated: Collection[str] | None
) -> dict[str, Any]:
    """Pretrain as `pretrain` does, and meanwhile prepare `config.data.uri` in `config.data.cache`.

    With a cache that is complete, a run that began while it was not goes on, and any other trains on it as on a
    prepared dataset. Raises also what `pipelines.prepare.prepare` raises.
    """
    data = config.data
    if is_prepared(open_storage(data.uri)):
        log.info("%s is a prepared dataset, so data.cache %s is not used", data.uri, data.cache)
        return pretrain(_reading(config, data.uri), preset, fresh=fresh, stated=stated)
    places = {"uri": open_storage(data.uri).uri, "cache": open_storage(data.cache).uri}
    config = dataclasses.replace(config, data=dataclasses.replace(data, **places))
    begun = begin(config.data.uri, config.data.cache, config.prepare)
    _refuse_values(config, begun)
    tracking = registry.open_tracking(config.tracking.experiment)
    pinned, start = with_starting_weights(config, tracking, stated)
    digest = _listed_digest(begun)
    name = run_name(pinned, preset, digest)
    folder = RunFolder(open_storage(open_storage(config.output).join(name)).uri)
    is_begun = (folder.read_identity() or {}).get("dataset") == digest
    if fresh or (is_begun and isinstance(begun, Manifest) and folder.read_listing() is None):
        folder.clear()
        is_begun = False
    if isinstance(begun, Manifest) and not is_begun:
        log.info("%s is prepared in %s: training on that", config.data.uri, config.data.cache)
        return pretrain(_reading(config, config.data.cache), preset, fresh=fresh, stated=stated)
    run = ListedRun(name=name, folder=folder, config=pinned, start=start, digest=digest)
    manifest = begun
    if not (isinstance(begun, Manifest) and run.has_ended_epoch(begun)):
        manifest = _first_epoch(run, begun, tracking)
    assert isinstance(manifest, Manifest)
    return run.drive(manifest, tracking)


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run whose dataset is prepared during its first epoch."""

    name: str
    folder: RunFolder
    config: PretrainConfig
    start: StartingWeights | None
    digest: str
    """Digest of the source and the options of its preparation."""

    def job(self) -> PretrainJob:
        """Return the job of the first epoch, with a normalization that is still to be replaced."""
        storage = self.folder.storage
        return PretrainJob(
            folder=storage.uri,
            config=self.config,
            pixels=Normalization(mean=(0.0,) * self.config.model.channels, std=(1.0,) * self.config.model.channels),
            backbone=storage.join("backbone") if self.start else "",
            listed=self.digest,
        )

    def pixels(self, first: SliceSummary) -> Normalization:
        """Return the normalization of the first epoch: that of the backbone, or of the first training slice."""
        channels = self.config.model.channels
        if self.start is not None and self.start.model.channels == channels:
            return self.start.pixels
        mean, std = first.sums["train"].mean_std()
        repeat = channels if len(mean) == 1 else 1
        return Normalization(mean=tuple(mean) * repeat, std=tuple(std) * repeat)

    def has_ended_epoch(self, manifest: Manifest) -> bool:
        """Return whether the first epoch on this dataset is done."""
        published = self._published(manifest)
        assert isinstance(published.job, PretrainJob)
        steps = train_plan(published.job, published.dataset).steps_per_epoch
        return self.folder.read_result() is not None or self.folder.checkpoints.latest_step() >= steps

    def drive(self, manifest: Manifest, tracking: Tracking) -> dict[str, Any]:
        """Run the other epochs on the prepared dataset, and publish the run."""
        published = self._published(manifest)
        tags = {**published.tags, "mae.dataset_digest": manifest.digest}
        return drive([dataclasses.replace(published, tags=tags)], self.name, tracking, fresh=False)[0]

    def _published(self, manifest: Manifest) -> PublishedJob:
        config = _reading(self.config, self.config.data.cache)
        uri, _ = open_dataset(config.data.uri)
        return published_pretrain_job(on_dataset(config, uri, manifest), self.name, manifest, self.start, self.digest)


def _reading(config: PretrainConfig, uri: str) -> PretrainConfig:
    """Return the config of a run on the prepared dataset at `uri`."""
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, uri=uri, cache=""), prepare=PrepareConfig()
    )


def _refuse_values(config: PretrainConfig, begun: Manifest | Preparation) -> None:
    """Raise UserError if the images are no 8-bit ones, whose value range only the whole source shows."""
    if isinstance(begun, Preparation) and not begun.tasks.kind.is_plain:
        config.data.refuse_cache(f"the value range of {begun.tasks.kind.dtype} images")


def _listed_digest(begun: Manifest | Preparation) -> str:
    """Return the digest of a source and of the options of its preparation, known before it begins."""
    if isinstance(begun, Manifest):
        identity = {"source_digest": begun.source_digest, "config": begun.config}
    else:
        identity = begun.identity
    return f"listed-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}"


def _first_epoch(run: ListedRun, begun: Manifest | Preparation, tracking: Tracking) -> Manifest:
    """Train the first epoch, while the dataset is being prepared unless it is; return its manifest."""
    registry.refuse_local_tracking(ray_address())
    registry.check_run_name(run.name)
    check_installed(run.config.tracking)
    died_s = last_alive_s(run.folder.storage)
    here = machine()
    job = settle(run.job(), here)
    assert isinstance(job, PretrainJob)
    log.info("%s", describe_compute(job.config, job.compute, here))
    key = claim(job, "pretrain", None)
    for path, content in (run.start.inputs if run.start else {}).items():
        run.folder.storage.write(path, content)
    tags = {"mae.folder": job.folder, **run.config.tracking.tag_values}
    delivered = tracking.run(run.name, "pretrain", shown_config(job), tags=tags, key=key)
    try:
        with (
            Heartbeat([run.folder.storage], lambda: [delivered.num_waiting]),
            stopping_at(lambda: _progress(run, begun)),
        ):
            manifest = _train(run, job, begun, delivered, key, died_s)
    except BaseException as error:
        mark_ended(delivered, error)
        raise
    delivered.close()
    return manifest


def _progress(run: ListedRun, begun: Manifest | Preparation) -> str:
    """Say how far the first epoch and the preparation got."""
    step = run.folder.checkpoints.latest_step()
    slices = "" if isinstance(begun, Manifest) or is_prepared(begun.tasks.target) else f", {begun.progress()}"
    return f"{run.name} stopped at step {step} of its first epoch{slices.replace('stopped with', 'with')}"


def _train(
    run: ListedRun,
    job: PretrainJob,
    begun: Manifest | Preparation,
    delivered: registry.Run,
    key: str,
    died_s: float | None,
) -> Manifest:
    storage, tracked = run.folder.storage, run.config.tracking
    with ExitStack() as stack:
        if job.compute.compile:
            keep_compiled(job.config.output)
        stack.enter_context(ray_session(job.compute))
        stop = StopRequest.new()
        announcements = Announcements(uuid4().hex, job.config.prepare.rows_per_group)
        preparing = stack.enter_context(_preparing(run, begun, announcements, stop, job.compute.num_workers))
        listing = _listing(run, begun, preparing)
        job = dataclasses.replace(job, pixels=from_dict(Normalization, listing["pixels"]))
        dataset = ListedDataset(
            announcements=announcements, most_samples=listing["most_samples"], num_expected=listing["num_expected"]
        )
        with ExitStack() as following:
            steps = -(-dataset.num_expected // job.reading.data.batch) * job.reading.epochs
            display = following.enter_context(ProgressDisplay(run.name, steps))
            following.enter_context(MetricFollower(storage, delivered, display=display))
            following.enter_context(tracking_elsewhere(tracked, storage, run.name, key, shown_config(job)))
            launch([(job, dataset)], run.name, died_s, stop)
        manifest = preparing.manifest()
    if not run.has_ended_epoch(manifest):
        raise RunFailed(
            f"the workers of {run.name} ended at step {run.folder.checkpoints.latest_step()}, within the first epoch; "
            "rerun the same command to continue"
        )
    return manifest


def _listing(run: ListedRun, begun: Manifest | Preparation, preparing: Preparing) -> dict[str, Any]:
    """Return normalization and numbers of samples of the first epoch, which a resumed run has in its folder."""
    found = run.folder.read_listing()
    if found is None:
        assert isinstance(begun, Preparation), "a run on a complete cache that lacks them trains as on any dataset"
        most, expected = num_trained_on(begun.parts, run.config.prepare.val_fraction)
        pixels = to_dict(run.pixels(preparing.first()))
        found = {"pixels": pixels, "most_samples": most, "num_expected": expected}
        run.folder.write_listing(found)
        run.folder.write_pixels(pixels)
    return found


@contextmanager
def _preparing(
    run: ListedRun, begun: Manifest | Preparation, announcements: Announcements, stop: StopRequest, num_workers: int
) -> Iterator[Preparing]:
    """Prepare on a thread while the block runs; if that fails, ask the workers to stop."""

    def work(preparing: Preparing) -> Manifest:
        if isinstance(begun, Manifest):
            announce_all(announcements, begun.split("train").shards)
            return begun

        def announce(summary: SliceSummary, num_done: int, num_slices: int) -> None:
            _check_channels(run.config, summary)
            preparing.announce(summary, num_done, num_slices)

        pool = RayTaskPool(begun.tasks, *_capacity(num_workers))
        preparing.done = 0, len(begun.parts)
        return begun.commit(begun.write_in_order(announce, preparing.is_stopped, pool))

    with Preparing(work, stop.make, announcements) as preparing:
        yield preparing


def _check_channels(config: PretrainConfig, summary: SliceSummary) -> None:
    if config.model.channels != 3 and any(sums.num_colour for sums in summary.sums.values()):
        raise UserError(
            f"source {config.data.uri} has images in colour but model.channels is {config.model.channels}; try "
            "--model.channels 3"
        )


def _capacity(num_workers: int) -> tuple[int, float]:
    """Return how many tasks of the preparation may run at a time, and the CPUs that each requests.

    In an embedded Ray, which declares CPUs for workers and data tasks alone, they request none. On a cluster they leave
    one CPU beside those of the workers to data tasks, and request none if there is no other.
    """
    import ray

    limit = task_limit()
    if limit is not None:
        return limit, 0
    free = int(ray.cluster_resources().get("CPU", 1)) - num_workers - 1
    return (free, 1) if free >= 1 else (1, 0)
