"""What each `mae` command calls. Imports are in the functions, so that a command imports what it needs alone."""

from dataclasses import dataclass
from typing import Any

from pipelines.config import KINDS, to_dict


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """A parsed command line."""

    command: str
    config: Any
    arguments: tuple[str, ...]
    preset: str
    json: bool
    fresh: bool
    stated: frozenset[str] = frozenset()
    """Fields of the config that options or the preset name, dotted, such as model.mask.ratio."""
    estimates: bool = False
    """Whether to estimate what the command would take instead of running it."""
    price: float | None = None
    """Price of one device for an hour, for the estimate."""


def prepare(call: Invocation) -> dict[str, Any]:
    from pipelines.prepare import prepare

    manifest = prepare(call.arguments[0], call.arguments[1], call.config)
    return {"uri": call.arguments[1], **manifest.summary}


def inspect(call: Invocation) -> dict[str, Any]:
    from pipelines.prepare.inspect import inspect_uri

    return inspect_uri(call.arguments[0], call.config)


def pretrain(call: Invocation) -> dict[str, Any]:
    from pipelines.stages import stage

    with stage("importing the driver"):
        from pipelines.drivers.pretrain import estimate_pretraining, pretrain

    stated = {name.removeprefix("model.") for name in call.stated if name.startswith("model.")}
    if call.estimates:
        return estimate_pretraining(call.config, call.preset or "pretrain", price=call.price, stated=stated)
    return pretrain(call.config, call.preset or "pretrain", fresh=call.fresh, stated=stated)


def finetune(call: Invocation) -> dict[str, Any]:
    from pipelines.drivers.classify import finetune

    return finetune(call.config, call.preset or "finetune", fresh=call.fresh)


def probe(call: Invocation) -> dict[str, Any]:
    from pipelines.drivers.classify import probe

    return probe(call.config, call.preset or "probe", fresh=call.fresh)


def evaluate(call: Invocation) -> dict[str, Any]:
    from pipelines.evaluation.evaluate import evaluate

    return evaluate(call.config, call.arguments[0])


def look(call: Invocation) -> dict[str, Any]:
    from pipelines.evaluation.look import look

    return look(call.arguments[0], call.arguments[1], call.config)


def segment(call: Invocation) -> dict[str, Any]:
    from pipelines.evaluation.segment import segment

    return segment(call.arguments[0], call.arguments[1], call.config)


def predict(call: Invocation) -> dict[str, Any]:
    from pipelines.embedding.predict import predict

    model, source, out = call.arguments
    return predict(model, source, out, call.config)


def embed(call: Invocation) -> dict[str, Any]:
    from pipelines.embedding.embed import embed

    return embed(call.arguments[0], call.arguments[1], call.config)


def neighbours(call: Invocation) -> dict[str, Any]:
    from pipelines.embedding.neighbours import neighbours

    return neighbours(call.arguments[0], call.config)


def curate(call: Invocation) -> dict[str, Any]:
    from pipelines.embedding.curate import curate

    return curate(call.arguments[0], call.arguments[1], call.config)


def sweep(call: Invocation) -> dict[str, Any]:
    from tune.sweep import sweep

    return sweep(call.config, call.preset or "sweep", fresh=call.fresh)


def reconstruct(call: Invocation) -> dict[str, Any]:
    if call.config.run:
        from pipelines.drivers.animation import animate

        return {"picture": animate(call.config)}
    from pipelines.pictures import reconstruct

    return {"picture": reconstruct.run(call.config)}


def register(call: Invocation) -> dict[str, Any]:
    from pipelines.drivers.register import register

    return register(call.arguments[0], call.config)


def promote(call: Invocation) -> dict[str, Any]:
    from pipelines.promotion.promote import promote

    return promote(call.arguments[0], call.config)


def rollback(call: Invocation) -> dict[str, Any]:
    from pipelines.promotion.rollback import rollback

    return rollback(call.arguments[0], call.config)


def registry_prune(call: Invocation) -> dict[str, Any]:
    from pipelines.promotion.prune import prune

    return prune(call.config)


def lineage(call: Invocation) -> dict[str, Any]:
    from pipelines.promotion.lineage import lineage

    return lineage(call.arguments[0], call.config)


def import_weights(call: Invocation) -> dict[str, Any]:
    from pipelines.weights.importing import import_weights

    return import_weights(call.arguments[0], call.config)


def export(call: Invocation) -> dict[str, Any]:
    from pipelines.weights.exporting import export_model

    return export_model(call.arguments[0], call.arguments[1], call.config)


def runs(call: Invocation) -> dict[str, Any]:
    from pipelines.runs.listing import runs

    return runs(call.arguments[0], call.config)


def exporter(call: Invocation) -> dict[str, Any]:
    from pipelines.monitoring.exporter import export

    return export(call.config)


def handoff(call: Invocation) -> dict[str, Any]:
    from pipelines.handoff.handing_over import handoff

    return handoff(call.config)


def submit(call: Invocation) -> dict[str, Any]:
    from pipelines.jobs.submit import submit

    return submit(call.arguments, call.config)


def jobs(call: Invocation) -> dict[str, Any]:
    from pipelines.jobs.submit import jobs

    return jobs(call.config)


def demo(call: Invocation) -> dict[str, Any]:
    from pipelines.cli.demo import demo

    return demo(call.config, fresh=call.fresh)


def doctor(call: Invocation) -> dict[str, Any]:
    from pipelines.cli.doctor import doctor

    return doctor()


def bench_step(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.step import run

    return run(call.config)


def bench_data(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.data import run

    return run(call.config)


def bench_embed(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.embedding import run

    return run(call.config)


def bench_feed(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.feeding import run

    return run(call.config)


def bench_prepare(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.preparing import run

    return run(call.config)


def bench_start(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.starting import run

    return run(call.config)


def bench_recipes(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.recipes import run

    return run(call.config)


def config(call: Invocation) -> dict[str, Any]:
    return {"kind": KINDS[type(call.config)], **to_dict(call.config)}
