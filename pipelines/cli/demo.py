"""End-to-end demo on a bundled sample: shards, pretraining, registry, probes, fine-tuning, a sweep, pictures."""

import json
import logging
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, TypeVar

from mae_core.errors import UserError
from pipelines import registry, sample
from pipelines.cluster import ray_session
from pipelines.config import (
    ClassifyConfig,
    ComputeConfig,
    DemoConfig,
    PrepareConfig,
    PretrainConfig,
    ReconstructConfig,
    SweepConfig,
    load_preset,
    with_overrides,
)
from pipelines.drivers.classify import (
    published_classify_job,
    starting_encoder,
    with_labelled_dataset,
    with_pinned_backbone,
)
from pipelines.drivers.drive import PublishedJob, drive
from pipelines.drivers.pretrain import pretrain
from pipelines.pictures import reconstruct
from pipelines.prepare import prepare

log = logging.getLogger(__name__)

T = TypeVar("T")

_PICTURED = 12
_QUICK: dict[str, dict[str, Any]] = {
    "demo_pretrain": {"epochs": 2, "optim.warmup_epochs": 1, "tracking.pictures_every_epochs": 2},
    "demo_probe": {"epochs": 4, "eval_every_epochs": 4, "optim.warmup_epochs": 1},
    "demo_finetune": {"epochs": 2, "eval_every_epochs": 2, "optim.warmup_epochs": 1},
    "demo_scratch": {"epochs": 2, "eval_every_epochs": 2, "optim.warmup_epochs": 1},
    "demo_sweep": {
        "space": {"model.mask.ratio": [0.5, 0.75]},
        "baselines": False,
        "trials_per_group": 1,
        "pretrain.epochs": 1,
        "pretrain.optim.warmup_epochs": 0,
        "probe.epochs": 2,
        "probe.eval_every_epochs": 2,
        "probe.optim.warmup_epochs": 0,
        "finetune.epochs": 1,
        "finetune.eval_every_epochs": 1,
        "finetune.optim.warmup_epochs": 0,
    },
}
"""Fields of the presets that `--quick` replaces."""
_CONCURRENT_TRIALS = 2


def demo(config: DemoConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Run the demo; return its accuracies and the paths of its pictures.

    A finished demo is not run again, but its result returned, unless `fresh`. Raises UserError if the output folder
    holds something other than a demo.
    """
    out = Path(config.output).resolve()
    if fresh and (out / "demo.json").is_file():
        shutil.rmtree(out)
    if (out / "demo.json").is_file():
        log.info("the demo in %s is finished; `mae demo --fresh` runs it again", out)
        return json.loads((out / "demo.json").read_text())
    if out.exists() and any(out.iterdir()) and not (out / "images").is_dir():
        raise UserError(f"folder {out} holds something other than a demo; try --output with a new folder")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{out}/mlflow.db")
    started_s = time.monotonic()
    with ray_session(ComputeConfig(num_workers=2), groups=_CONCURRENT_TRIALS):
        found = _run(config, out)
    result = found | {"duration_s": round(time.monotonic() - started_s, 1)}
    result["text"] = _text(result)
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    return result


def _run(config: DemoConfig, out: Path) -> dict[str, Any]:
    from tune.sweep import sweep

    log.info("1/6  preparing: turning images into shards")
    manifest = prepare(str(sample.unpack(out / "images")), str(out / "prepared"), PrepareConfig())
    log.info("     %s images, digest %s", f"{manifest.num_ok:,}", manifest.digest[:12])

    log.info("2/6  pretraining a pico MAE with two DDP workers")
    where = {"output": str(out / "runs"), "data.uri": str(out / "prepared")}
    pretrained = pretrain(_preset(PretrainConfig, "demo_pretrain", config, where), "demo_pretrain")
    log.info("     registered as %s", pretrained["model"])

    log.info("3/6  probing, fine-tuning from the registry, training from scratch on the same labels")
    accuracy = _compare(config, where, pretrained["model"])

    log.info("4/6  sweeping mask ratio x decoder depth")
    dotted = {f"{part}.{key}": value for part in ("pretrain", "probe", "finetune") for key, value in where.items()}
    swept = sweep(_preset(SweepConfig, "demo_sweep", config, dotted | {"output": str(out / "runs")}), "demo_sweep")

    log.info("5/6  drawing reconstructions of test images")
    pictured = ReconstructConfig(
        model=pretrained["model"],
        uri=str(out / "prepared"),
        num_images=_PICTURED,
        out=str(out / "reconstructions.png"),
    )
    picture = Path(reconstruct.run(pictured))
    figure = out / "masking_ratio.png"
    shutil.copyfile(swept["figure"], figure)

    log.info("6/6  logging the pictures to MLflow, in the run of the pretraining")
    tracking = registry.open_tracking("mae")
    run = tracking.known_run(pretrained["run_id"])
    for path in (picture, figure):
        run.log_file(path, "demo")
    return {
        **accuracy,
        "reconstructions": str(picture),
        "masking_ratio": str(figure),
        "model": pretrained["model"],
        "report": swept["report"],
        "best": swept["best"],
        "best_preset": swept["best_preset"],
        "ui": tracking.ui_command,
    }


def _preset(cls: type[T], preset: str, config: DemoConfig, point: dict[str, Any]) -> T:
    """Load a preset, shortened if the demo is quick, with the dotted fields of `point` replaced."""
    return with_overrides(load_preset(cls, preset), (_QUICK[preset] if config.quick else {}) | point)


def _compare(config: DemoConfig, where: dict[str, Any], model: str) -> dict[str, Any]:
    """Return top-1 on test, mean over seeds, starting from the registered model and from random weights."""
    tracking = registry.open_tracking("mae")
    scratch = f"random:{load_preset(PretrainConfig, 'demo_pretrain').model.arch}"
    num_seeds = 1 if config.quick else config.seeds
    plans = [
        ("probe_mae", "demo_probe", model, 1),
        ("probe_random", "demo_probe", scratch, 1),
        ("finetune_mae", "demo_finetune", model, num_seeds),
        ("finetune_scratch", "demo_scratch", scratch, num_seeds),
    ]
    names: list[str] = []
    jobs: list[PublishedJob] = []
    for measure, preset, backbone, times in plans:
        for seed in range(times):
            point = where | {
                "backbone": backbone,
                "seed": seed,
                "tracking.register": measure == "finetune_mae" and seed == 0,
            }
            published = _published_job(
                _preset(ClassifyConfig, preset, config, point), f"demo_{measure}-{seed}", tracking
            )
            names.append(measure)
            jobs.append(published)
    outcomes = drive(jobs, "demo-classifiers", tracking, fresh=False)
    found: dict[str, Any] = {}
    for measure, *_ in plans:
        scores = [outcome["top1"] for name, outcome in zip(names, outcomes, strict=True) if name == measure]
        found[measure] = round(statistics.mean(scores), 2)
        found[f"{measure}_seeds"] = scores
    found["classifier"] = next(outcome["model"] for outcome in outcomes if "model" in outcome)
    return found


def _published_job(config: ClassifyConfig, name: str, tracking: registry.Tracking) -> PublishedJob:
    config, manifest = with_labelled_dataset(config)
    config, ref = with_pinned_backbone(config, tracking)
    return published_classify_job(config, name, starting_encoder(config, ref, tracking, manifest), manifest)


_ROWS = (
    ("finetune_mae", "MAE, fine-tuned"),
    ("finetune_scratch", "from scratch, same labels and budget"),
    ("probe_mae", "linear probe of MAE"),
    ("probe_random", "linear probe of a random encoder"),
)


def _text(result: dict[str, Any]) -> str:
    """Format the result as the table that is printed at the end."""
    lines = ["", f"{'':38}top-1 on test, %   each seed"]
    for measure, title in _ROWS:
        seeds = "  ".join(f"{score:.1f}" for score in result[f"{measure}_seeds"])
        lines.append(f"{title:38}{result[measure]:>15.1f}   {seeds}")
    lines += [
        "",
        f"reconstructions   {result['reconstructions']}",
        f"masking ratio     {result['masking_ratio']}",
        f"report            {result['report']}",
        f"backbone          {result['model']}",
        f"classifier        {result['classifier']}",
        f"best of the sweep {result['best']}  (mae pretrain --preset {result['best_preset']})",
        f"took {result['duration_s']:.0f} s; to see all results in MLflow:",
        f"  {result['ui']}",
    ]
    return "\n".join(lines)
