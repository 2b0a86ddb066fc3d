"""`mae register`: register a checkpoint of a pretraining run as a new model version."""

import json
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.config import PretrainConfig, RegisterConfig, from_dict, to_dict
from pipelines.dataset.manifest import is_prepared, read_manifest
from pipelines.drivers.drive import manifest_json, newest_picture
from pipelines.runs.folder import RunFolder
from pipelines.storage import open_storage


def register(run_and_step: str, config: RegisterConfig) -> dict[str, Any]:
    """Register the run's newest checkpoint, or that of RUN@STEP, as a new model version; return its URI, step and run.

    Only the run folder is read, since the dataset may no longer exist. Raises UserError if there is no such checkpoint.
    """
    from pipelines.worker.export import backbone_files

    folder, step = _checkpoint_named(run_and_step)
    values, uri = folder.read_identity(), folder.storage.uri
    assert values is not None, "_checkpoint_named returns only folders of runs"
    dataset = open_storage(folder.storage.join("dataset"))
    if values.get("job", {}).get("listed") and not is_prepared(dataset):
        raise UserError(f"run {uri} is in the epoch in which its dataset is prepared; register it once that has ended")
    checkpoint = folder.checkpoints.load(step)
    weights = checkpoint.files.get("ema.safetensors", checkpoint.files["model.safetensors"])
    run_config = from_dict(PretrainConfig, json.loads(folder.storage.read("config.json")))
    files: dict[str, bytes | Path] = dict(
        backbone_files(run_config.model, from_dict(Normalization, folder.read_pixels()), weights)
    )
    manifest = read_manifest(dataset)
    files |= {"manifest.json": manifest_json(manifest)} | newest_picture(folder)
    name = config.name or run_config.tracking.name or f"mae-{run_config.model.arch}"
    tags = {"mae.step": str(step)}
    tracking = registry.open_tracking(config.experiment or run_config.tracking.experiment)
    run = tracking.find_run(values["id"])
    if run is not None:
        # What the run started from is its parent, whose licence and origin are those of every checkpoint.
        parent = tracking.resolve(run.backbone) if run.backbone else None
        ref = registry.register_backbone(run, files, name, parent=parent, tags=tags)
        return {"model": ref.uri, "step": step, "run_id": run.id}
    # This MLflow server does not know the run, for example because it was trained at another site. It may not know the
    # version either that the run started from, whose licence and origin the run folder keeps.
    tags |= _provenance(folder).licence_tags
    run = tracking.run(
        Path(uri).name,
        "pretrain",
        to_dict(run_config),
        dataset=manifest,
        dataset_uri=run_config.data.uri,
        key=values["id"],
    )
    try:
        ref = registry.register_backbone(run, files, name, tags=tags)
    finally:
        run.finish("FINISHED" if folder.read_result() else "KILLED")
    return {"model": ref.uri, "step": step, "run_id": run.id}


def _provenance(folder: RunFolder) -> registry.Provenance:
    """Read what the run noted about the version that it continued from; nothing is known if it started at random."""
    path = f"backbone/{registry.PROVENANCE}"
    if not folder.storage.exists(path):
        return registry.Provenance()
    return registry.Provenance.parse(folder.storage.read(path), folder.storage.join(path))


def _checkpoint_named(run_and_step: str) -> tuple[RunFolder, int]:
    """Parse RUN or RUN@STEP into a run folder and a step. Raises UserError if there is no such checkpoint."""
    uri, at, wanted = run_and_step.rpartition("@")
    folder = RunFolder(run_and_step)
    if at and folder.read_identity() is None:
        if not wanted.isdigit():
            raise UserError(f"step {wanted!r} of {run_and_step!r} is not a number; try RUN@STEP, such as {uri}@1000")
        folder = RunFolder(uri)
    else:
        uri, wanted = run_and_step, ""
    values = folder.read_identity()
    if values is None or values.get("kind") != "pretrain":
        raise UserError(f"{uri} is not the folder of a pretraining run; try the folder that `mae pretrain` printed")
    steps = folder.checkpoints.steps()
    if not steps or (wanted and int(wanted) not in steps):
        raise UserError(
            f"run {uri} has no checkpoint {wanted or 'at all'}; it has steps {', '.join(map(str, steps)) or 'none'}"
        )
    return folder, int(wanted or steps[-1])
