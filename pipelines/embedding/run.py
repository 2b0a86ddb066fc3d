"""Compute all parts on Ray Data actors, resume where a killed run stopped, and write the manifest last."""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mae_core.errors import UserError
from pipelines import cluster
from pipelines.config import ComputeConfig
from pipelines.config.embedding import ActorConfig
from pipelines.embedding.inputs import Input, Part, open_input
from pipelines.embedding.parts import Measure, PartSummary, PartWorker, Plan
from pipelines.interrupts import stopping_at
from pipelines.machine import num_cores
from pipelines.prepare import refuse_within
from pipelines.prepare.quarantine import MIN_BAD_TO_STOP, refuse_bad
from pipelines.prepare.tasks import unwrapped
from pipelines.prepare.workfolder import Purpose, WorkFolder
from pipelines.registry import ModelFiles
from pipelines.storage import Storage, open_storage

log = logging.getLogger(__name__)

T = TypeVar("T")
_SAY_EVERY_S = 10.0
_SCHEMA = 1
# Parts that an actor holds: one passes through the model while the next is read, or the last one written.
_PARTS_PER_ACTOR = 2


@dataclass(frozen=True, kw_only=True)
class Table:
    """One Parquet file of results."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """The manifest of what was computed, written last. `digest`, over all other fields but `source`, identifies it."""

    kind: str
    source: str
    """Where the images were when they were read."""
    identity: dict[str, Any]
    """Dataset, model and options, which decide every value."""
    model: str
    """The version, or the folder of an export."""
    num_found: int
    num_rows: int
    num_quarantined: int
    quarantine_reasons: dict[str, int]
    tables: list[Table]
    schema: int = _SCHEMA
    digest: str = ""

    def sealed(self) -> "Results":
        """Return the manifest with its digest."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("digest", "source")}
        content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        return dataclasses.replace(self, digest=hashlib.sha256(content).hexdigest())

    @property
    def summary(self) -> dict[str, Any]:
        """What commands print with --json."""
        return {
            "digest": self.digest,
            "model": self.model,
            "dataset_digest": self.identity["input"]["digest"],
            "num_found": self.num_found,
            "num_rows": self.num_rows,
            "num_quarantined": self.num_quarantined,
            "reasons": dict(self.quarantine_reasons),
            "num_files": len(self.tables),
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one command computes, and for which options."""

    purpose: Purpose
    kind: str
    manifest: str
    measure: Measure
    model: ModelFiles
    options: dict[str, Any]
    """Options that decide the values."""
    batch: int


def compute(job: Job, source: str, out: str, actors: ActorConfig) -> Results:
    """Compute every image of `source` into `out`; return existing results of the same source, model and options.

    found = rows + quarantined. The bytes depend on images, model and options, not on the number of actors or earlier
    attempts. Raises UserError if more images are bad than `max_bad` allows, if none is readable, or if `out` holds
    something else. Raises Interrupted, which says how many parts are done, after a signal.
    """
    target, origin = open_storage(out), open_storage(source)
    refuse_within(target, origin)
    with ExitStack() as stack:
        found = open_input(source, stack)
        identity = {"input": found.identity, "model": job.model.sha256, "options": job.options | {"batch": job.batch}}
        work = WorkFolder(target, job.purpose)
        if target.exists(job.manifest):
            return _existing(target, job, identity, work)
        work.claim(identity)
        num_parts = work.put_slices(found.parts(actors.rows_per_part, job.batch))
        with stopping_at(lambda: f"stopped with {len(work.done())} of {num_parts} parts done"):
            _run(job, found, work, target, num_parts, actors)
        summaries = [PartSummary.from_json(content) for content in work.records()]
        results = _results(job, origin.uri, identity, summaries)
        _check(results, target, found.num_found, actors.max_bad)
    target.write(job.manifest, json.dumps(dataclasses.asdict(results), indent=1, sort_keys=True).encode() + b"\n")
    work.remove()
    return results


def read_results(target: Storage, name: str, command: str) -> Results:
    """Read a manifest of the command. Raises UserError if there is none, or if it is damaged or of another version."""
    try:
        values = json.loads(target.read(name))
        if values["schema"] != _SCHEMA:
            raise UserError(
                f"{target.join(name)} has schema {values['schema']} instead of {_SCHEMA}; run `{command}` again"
            )
        return TypeAdapter(Results).validate_python(values)
    except FileNotFoundError:
        raise UserError(f"{target.uri} has no {name}; run `{command}` first, or again if it was killed") from None
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError):
        raise UserError(f"{target.join(name)} is damaged; run `{command}` into an empty folder") from None


def _existing(target: Storage, job: Job, identity: dict[str, Any], work: WorkFolder) -> Results:
    """Return the results that are already there. Raises UserError if their source, model or options differ."""
    results = read_results(target, job.manifest, f"mae {job.kind}")
    words = {"input": "source", "model": "model", "options": "config"}
    differing = [word for key, word in words.items() if results.identity.get(key) != identity[key]]
    if differing:
        raise UserError(
            f"{target.uri} holds the {job.purpose.result} of another {' and '.join(differing)}; "
            "choose another folder, or empty it"
        )
    if work.exists:
        work.remove()
    return results


def _run(job: Job, found: Input, work: WorkFolder, target: Storage, num_parts: int, actors: ActorConfig) -> None:
    """Compute the parts that are missing. Raises UserError early if too many images are bad."""
    done = work.done()
    if done:
        log.info("resuming: %d of %d parts are done", len(done), num_parts)
    todo = [number for number in range(num_parts) if number not in done]
    if not todo:
        return
    plan = Plan(
        reader=found.reader,
        work=work,
        target=target,
        measure=job.measure,
        batch=job.batch,
        max_pixels=actors.max_pixels,
        threads=actors.threads,
        decoders=1,
        gpu=actors.gpu,
    )
    num_bad, num_read, said_s, fits = 0, 0, time.monotonic(), job.batch
    for counts in run_parts(todo, plan, job.model.weights, actors):
        num_bad, num_read = num_bad + counts["num_bad"], num_read + counts["num_found"]
        if counts["batch"] < fits:
            fits = counts["batch"]
            log.warning("a batch of %d does not fit in the GPU's memory; computing %d at a time", job.batch, fits)
        if num_bad > MIN_BAD_TO_STOP:
            refuse_bad(target, num_bad, found.num_found, actors.max_bad)
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            log.info("%d of %d images in this run; %d parts were done before", num_read, found.num_found, len(done))


def run_parts(
    todo: Sequence[int], plan: Plan, weights: bytes, actors: ActorConfig, worker: type[PartWorker] = PartWorker
) -> Iterator[dict[str, Any]]:
    """Compute parts on a pool of actors; yield what each returns in order of completion.

    Raises what the storage raised, or UserError if there are no GPUs, or fewer resources than actors.
    """
    embedded = not cluster.ray_address()
    # Ray 2.60 logs an error for every actor that Ray Data itself starts, and nothing else that we would not raise.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    here = num_cores() // actors.threads or 1
    with cluster.ray_session(ComputeConfig(num_workers=max(1, actors.actors or here), data_tasks=1)):
        import ray
        import ray.data
        from ray.exceptions import RayError

        from pipelines.ray_data import configure

        num_actors = min(_num_actors(actors, here if embedded else None), len(todo))
        plan = dataclasses.replace(plan, decoders=_decoders(actors, num_actors))
        numbers = [{"number": number} for number in todo]
        dataset = ray.data.from_items(numbers, override_num_blocks=len(todo)).map(
            worker,  # pyright: ignore[reportArgumentType] -- a class is allowed
            fn_constructor_args=(plan, ray.put(weights)),
            compute=ray.data.ActorPoolStrategy(
                size=num_actors,
                max_tasks_in_flight_per_actor=_PARTS_PER_ACTOR,
                max_concurrent_calls_per_actor=_PARTS_PER_ACTOR,
                # Without it, Ray Data lets one call at a time through, whatever the limit above.
                enable_true_multi_threading=True,
            ),
            num_cpus=1 if embedded or actors.gpu else actors.threads,
            num_gpus=1 if actors.gpu else 0,
        )
        configure(dataset)
        try:
            yield from dataset.iter_rows()
        except RayError as error:
            raise unwrapped(error) from error


def _num_actors(actors: ActorConfig, here: int | None) -> int:
    """Return the number of actors: as asked for, or one per GPU or per `threads` CPUs."""
    import ray

    has = ray.cluster_resources()
    if actors.gpu:
        num_gpus = int(has.get("GPU", 0))
        if num_gpus < max(1, actors.actors or 1):
            raise UserError(
                f"actors {actors.actors or 1} with --gpu need as many GPUs, but Ray has {num_gpus}; try fewer"
            )
        return actors.actors or num_gpus
    if here is not None:
        return actors.actors or here
    most = max(1, int(has.get("CPU", 1)) // actors.threads)
    if (actors.actors or 1) > most:
        raise UserError(
            f"actors {actors.actors} of {actors.threads} CPUs each are more than the cluster has room for; try {most}"
        )
    return actors.actors or most


def _decoders(actors: ActorConfig, num_actors: int) -> int:
    """Return the decoding threads of one actor: a GPU needs many CPUs, and a CPU actor decodes on its own."""
    import ray

    if not actors.gpu:
        return 1
    num_cpus = int(ray.cluster_resources().get("CPU", 1)) if cluster.ray_address() else num_cores()
    return max(1, num_cpus // num_actors)


def _results(job: Job, source: str, identity: dict[str, Any], summaries: Sequence[PartSummary]) -> Results:
    reasons: dict[str, int] = {}
    for summary in summaries:
        for reason, count in summary.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return Results(
        kind=job.kind,
        source=source,
        identity=identity,
        model=job.model.shown,
        num_found=sum(summary.num_found for summary in summaries),
        num_rows=sum(summary.num_rows for summary in summaries),
        num_quarantined=sum(reasons.values()),
        quarantine_reasons=dict(sorted(reasons.items())),
        tables=[
            Table(
                path=Part(number=summary.number, first_id=0, num_rows=0, split="").table,
                num_rows=summary.num_rows,
                num_bytes=summary.num_bytes,
                sha256=summary.sha256,
            )
            for summary in summaries
            if summary.num_rows
        ],
    ).sealed()


def _check(results: Results, target: Storage, num_found: int, max_bad: float) -> None:
    """Raise UserError if no image is readable, or too many are bad."""
    assert results.num_found == num_found == results.num_rows + results.num_quarantined, "every image is accounted for"
    refuse_bad(target, results.num_quarantined, num_found, max_bad)
    if not results.num_rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in results.quarantine_reasons.items())
        raise UserError(f"no readable image among the {num_found} of {results.source} ({counts}); check the files")
    if results.num_quarantined:
        log.warning("%d of %d images were quarantined", results.num_quarantined, num_found)
