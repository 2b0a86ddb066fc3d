"""What extending a finished run takes from it: its config, its last checkpoint, its model version.

An extension is a run of its own that continues where another ended: same model, images and normalization, weights and
optimizer state of the last checkpoint, epochs counted on. Its learning-rate schedule covers its own epochs alone.
"""

import dataclasses
import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.config import PretrainConfig, config_hash, dotted_fields, from_dict, options_for, with_overrides
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.drivers.drive import CopiedCheckpoint
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import Extended
from pipelines.runs.listing import line, list_runs
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

_FIXED = ("masks_per_image", "crops_per_image", "ema_decay", "optim.name", "data.labels_per_class")
"""Fields beside those of the model that decide what an epoch is, or to what the state in a checkpoint belongs."""


@dataclass(frozen=True, kw_only=True)
class ExtendedRun:
    """A finished pretraining run, as an extension starts from it."""

    folder: RunFolder
    name: str
    output: str
    """URI of the folder under which the run has its name."""
    id: str
    config: PretrainConfig
    pixels: Normalization
    digest: str
    """Digest of its dataset's manifest."""
    epochs: int
    """Epochs until its end, those of runs that it extends included."""
    outcome: Mapping[str, Any]

    @property
    def version(self) -> str:
        """Model version that the run registered, else the one that it came from; empty if neither exists."""
        return self.outcome.get("model") or self.outcome.get("parent") or self.config.backbone

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the MLflow run of an extension, which name this run."""
        return {
            "mae.extends": self.folder.storage.uri,
            "mae.extends_run_id": str(self.outcome["run_id"]),
            "mae.first_epoch": str(self.epochs),
        }

    def extended(self) -> Extended:
        """Return what the job of an extension takes from the run."""
        from mae_core.schedule import peak_lr
        from pipelines.worker.loop import schedule

        config = self.config.reading
        steps_per_epoch = self.outcome["steps"] * self.config.views_per_image // self.epochs
        peak = peak_lr(config.optim.base_lr, config.data.batch)
        ended = schedule(config.optim, peak, steps_per_epoch, config.epochs)
        return Extended(run=self.id, epochs=self.epochs, end_lr=ended.lr(ended.total_steps))

    def last_checkpoint(self, step: int, steps_per_epoch: int) -> CopiedCheckpoint:
        """Return the run's last checkpoint as the first one of an extension, which counts `step` steps until there.

        Raises UserError if it was deleted.
        """
        wanted, steps = self.outcome["steps"], self.folder.checkpoints.steps()
        if wanted not in steps:
            raise UserError(
                f"run {self.folder.storage.uri} has lost the checkpoint of its last step {wanted} (it has "
                f"{', '.join(map(str, steps)) or 'none'}); {self._other_model()} without its optimizer state"
            )
        return CopiedCheckpoint(source=self.folder, source_step=wanted, step=step, steps_per_epoch=steps_per_epoch)

    def check(self, config: PretrainConfig, manifest: Manifest) -> None:
        """Raise UserError if this config, on that dataset, trains another model or other images than the run did."""
        theirs, mine = dotted_fields(self.config), dotted_fields(config)
        for name in mine:
            if (name.startswith("model.") or name in _FIXED) and mine[name] != theirs[name]:
                raise UserError(
                    f"{name} of run {self.name} is {theirs[name]}, and {mine[name]} would not continue it; leave it "
                    f"out, or {self._other_model()}"
                )
        if manifest.digest != self.digest:
            raise UserError(
                f"dataset {config.data.uri} has digest {manifest.digest[:12]}, but run {self.name} was trained on "
                f"{self.digest[:12]}; give that dataset as --data.uri, or {self._other_model()} on other images"
            )

    def model_version(self, tracking: registry.Tracking) -> registry.ModelRef | None:
        """Return the version that an extension's version is a child of; None if there is none.

        Raises UserError if MLflow does not have the version, or has another of that name.
        """
        if not self.version:
            return None
        remedy = f"run {self.name} names it; set MLFLOW_TRACKING_URI to the MLflow that has the run"
        try:
            ref = tracking.resolve(self.version)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        if self.outcome.get("model") and ref.run_id != self.outcome["run_id"]:
            raise UserError(f"{ref.uri} in {tracking.shown} was registered by another run; {remedy}")
        return ref

    def _other_model(self) -> str:
        version = self.version or "models:/NAME@ALIAS"
        return f"try --model {version} to start a run from its weights"


def read_finished_run(run: str, output: str) -> ExtendedRun:
    """Read the finished pretraining run in folder `run`, or of that name under `output`.

    Raises UserError if there is none, or if it is not finished, with the command that finishes it.
    """
    folder = _find(run, output)
    identity = folder.read_identity()
    if identity is None or identity.get("kind") != "pretrain":
        raise UserError(
            f"{run!r} is neither the folder of a pretraining run nor the name of one under {open_storage(output).uri}; "
            "try one that `mae runs` lists there"
        )
    config = from_dict(PretrainConfig, json.loads(folder.storage.read("config.json")))
    uri = folder.storage.uri
    name = config.name if config.name and uri.endswith(f"/{config.name}") else uri.rsplit("/", 1)[-1]
    where, outcome = uri.removesuffix(f"/{name}"), folder.read_outcome()
    if outcome is None:
        (status,) = list_runs(uri)
        remedy = (
            f"wait until it has ended: mae runs {shlex.quote(uri)} --watch"
            if status.state == "running"
            else f"finish it first: {command_of(dataclasses.replace(config, name=name, output=where))}"
        )
        raise UserError(f"run {uri} is not finished ({line(status)}); {remedy}")
    job = identity["job"]
    return ExtendedRun(
        folder=folder,
        name=name,
        output=where,
        id=identity["id"],
        config=config,
        pixels=from_dict(Normalization, folder.read_pixels()),
        digest=_dataset_digest(folder, identity),
        epochs=config.epochs + job.get("extended", {}).get("epochs", 0),
        outcome=outcome,
    )


def _dataset_digest(folder: RunFolder, identity: dict[str, Any]) -> str:
    """Return the digest of the dataset that the run was trained on, also if it was prepared during the first epoch."""
    if not identity["job"].get("listed"):
        return identity["dataset"]
    return read_manifest(open_storage(folder.storage.join("dataset"))).digest


def _find(run: str, output: str) -> RunFolder:
    """Return the folder `run` if it holds a run, else that of the run of this name under `output`."""
    folder = RunFolder(run)
    if folder.read_identity() is None and not run.startswith(("/", ".", "~")) and "://" not in run:
        return RunFolder(open_storage(output).join(run))
    return folder


def extension_of(run: str, overrides: Mapping[str, Any], output: str = "runs") -> PretrainConfig:
    """Return the config of a run that extends `run`: a run folder, or the name of a run under `output`.

    `overrides` names fields, dotted; "epochs", those to train after the run's end, is required. All others are the
    run's own, but for its name and for images that grow, which it has at full size. The warm-up keeps its share of the
    epochs. Raises UserError if there is no such run, if it is not finished, or for a wrong field.
    """
    if "epochs" not in overrides:
        raise UserError(f"extending {run} needs --epochs, those to train after the run's end; try --epochs 100")
    extended = read_finished_run(run, output)
    config, epochs = extended.config, overrides["epochs"]
    own: dict[str, Any] = {"name": "", "backbone": "", "output": extended.output, "extend": extended.folder.storage.uri}
    # The run ended with images of full size.
    own["progressive.first_px"] = None
    if isinstance(epochs, int):
        own["optim.warmup_epochs"] = config.optim.warmup_epochs * max(0, epochs) / config.epochs
    return with_overrides(config, {**own, **overrides, "extend": own["extend"]})


def command_of(config: PretrainConfig) -> str:
    """Return a `mae pretrain` command line that has this config. Raises UserError if it extends a run that is gone."""
    words = ["mae", "pretrain"]
    if config.extend:
        words += [f"--extend={config.extend}", f"--epochs={config.epochs}"]
        default = extension_of(config.extend, {"epochs": config.epochs})
    else:
        default = PretrainConfig()
    return shlex.join([*words, *options_for(config, default)])


def extension_name(config: PretrainConfig, run: ExtendedRun) -> str:
    """Return the config's name, or the extended run's name with another hash at its end.

    Raises UserError if the extension would lie in the folder of the run.
    """
    stem = re.sub(r"-[0-9a-f]{12}$", "", run.name)
    name = config.name or f"{stem}-{config_hash(config, run.digest, run.id)}"
    uri = open_storage(config.output).join(name)
    if f"{uri}/".startswith(f"{run.folder.storage.uri}/"):
        raise UserError(f"name {name!r} puts the extension into the folder of the run that it extends; try another")
    return name


def describe_extension(config: PretrainConfig, run: ExtendedRun) -> str:
    """Describe in one line what is added to the run, and at what learning rates."""
    from mae_core.schedule import peak_lr

    optim, end_lr = config.optim, run.extended().end_lr
    peak = peak_lr(optim.base_lr, config.data.batch)
    warmup = f"in {optim.warmup_epochs:g} epochs" if optim.warmup_epochs else "at once"
    parts = [f"from {end_lr:.3g} to {peak:.3g} {warmup}"]
    if optim.schedule == "cosine":
        kind, parts = "warm restart", [*parts, f"a cosine to {optim.min_lr:.3g}"]
    else:
        kind, decay = "constant rate", optim.decay_share * config.epochs
        parts += [f"decay to {optim.min_lr:.3g} in the last {decay:g} epochs" if decay else "no decay"]
    total = run.epochs + config.epochs
    return f"{config.epochs} epochs after the {run.epochs} of {run.name}, {total} in all; {kind}: {', '.join(parts)}"
