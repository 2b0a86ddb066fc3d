"""`mae import`: register weights that another project, or another site, trained as a model version."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mae_core.config import ClassifierConfig
from mae_core.errors import UserError
from mae_core.formats.ours import encoder_part
from mae_core.formats.weights import Weights, convert
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.config import ImportConfig, to_dict
from pipelines.registry import PROVENANCE
from pipelines.storage import storage_of
from pipelines.weights.sources import ForeignWeights, OwnExport, read_source

log = logging.getLogger(__name__)

_IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_OFFICIAL = "--licence CC-BY-NC-4.0 --origin https://github.com/facebookresearch/mae"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Files to register, and what they are."""

    kind: str
    what: str
    summary: str
    files: dict[str, bytes | Path]
    notes: tuple[str, ...] = ()


def import_weights(source: str, config: ImportConfig) -> dict[str, Any]:
    """Register the weights as a version of `config.name`; return the version and what was found.

    The same import again returns the same version. Raises UserError for weights that are not those of an MAE or a plain
    ViT, or that have no licence, before anything is written.
    """
    if not config.name:
        raise UserError("the imported model has no name; try --name mae-vit_base_patch16-official")
    with TemporaryDirectory(prefix="mae-import-") as folder:
        read = read_source(source, Path(folder))
        config = _with_licence(read, config)
        found = _own(read) if isinstance(read, OwnExport) else _foreign(read, config)
        log.info("%s: %s; %s", read.name, found.what, found.summary)
        for note in found.notes:
            log.info("%s: %s", read.name, note)
        return _register(found, read, source, config)


def _own(read: OwnExport) -> Import:
    what = "a classifier" if read.kind == "classifier" else "a backbone"
    decoder = ", with decoder" if "mae.safetensors" in read.files else ""
    values = read.config["model"] if read.kind == "backbone" else read.config
    height_px, width_px = values["image_px"]
    return Import(
        kind=read.kind,
        what=f"{what} that this project exported",
        summary=f"{values['arch']} at {height_px} x {width_px} px{decoder}",
        files=dict(read.files),
    )


def _foreign(read: ForeignWeights, config: ImportConfig) -> Import:
    """Convert the weights, with what the user says instead of what the files say."""
    said = {
        "image_px": config.image_px,
        "decoder_heads": config.decoder_heads,
        "target": config.target,
        "classes": _class_names(config.classes),
    }
    hints = dataclasses.replace(read.hints, **{key: value for key, value in said.items() if value})
    weights = convert(read.checkpoint, hints, read.name)
    return Import(
        kind="classifier" if weights.kind == "classifier" else "backbone",
        what=weights.what,
        summary=weights.summary,
        files=_files(weights, _normalization(read, config, weights.model.channels)),
        notes=weights.notes,
    )


def _with_licence(read: ForeignWeights | OwnExport, config: ImportConfig) -> ImportConfig:
    """Return the config with the licence and origin that the weights brought along.

    Raises UserError if the user states others, or if weights of others have none.
    """
    provenance = read.provenance
    if provenance is not None:
        for option in ("licence", "origin"):
            known, stated = getattr(provenance, option), getattr(config, option)
            if known and stated and known != stated:
                raise UserError(
                    f"{PROVENANCE} beside {read.name} states {option} {known!r}, not {stated!r}; leave --{option} out"
                )
        return dataclasses.replace(
            config,
            licence=config.licence or provenance.licence,
            origin=config.origin or provenance.origin,
        )
    if isinstance(read, ForeignWeights) and not (config.licence and config.origin):
        said = f"the source says {read.licence}" if read.licence else f"the official MAE's are {_OFFICIAL}"
        raise UserError(
            f"{read.name} holds weights of others, whose licence and origin stay with all that is trained from them; "
            f"give --licence and --origin ({said})"
        )
    return config


def _class_names(uri: str) -> tuple[str, ...]:
    """Read class names, one a line."""
    if not uri:
        return ()
    storage, name = storage_of(uri)
    return tuple(line.strip() for line in storage.read(name).decode().splitlines() if line.strip())


def _normalization(read: ForeignWeights, config: ImportConfig, channels: int) -> Normalization:
    """Return what the user, the files, or else ImageNet say. Raises UserError if it is for other channels."""
    found = read.normalization or _IMAGENET
    if config.mean:
        found = Normalization(mean=config.mean, std=config.std)
    if len(found.mean) == 1:
        found = Normalization(mean=found.mean * channels, std=found.std * channels)
    if len(found.mean) != channels:
        raise UserError(
            f"mean and std of {len(found.mean)} channels are known, but the model takes {channels}; give --mean and "
            "--std with one value a channel"
        )
    return found


def _files(weights: Weights, normalization: Normalization) -> dict[str, bytes | Path]:
    from pipelines.worker.export import backbone_files, classifier_files, encoder_files

    model = weights.model
    if weights.kind == "classifier":
        return dict(
            classifier_files(
                weights.tensors,
                ClassifierConfig(pool=weights.pool),
                arch=model.arch,
                image_px=model.image_px,
                channels=model.channels,
                classes=weights.classes,
                norm_eps=model.norm_eps,
                pixels=normalization,
            )
        )
    if weights.kind == "mae":
        from mae_core.state import pack

        return dict(backbone_files(model, normalization, pack(weights.tensors)))
    return dict(encoder_files(model, normalization, encoder_part(weights.tensors)))


def _register(found: Import, read: ForeignWeights | OwnExport, source: str, config: ImportConfig) -> dict[str, Any]:
    """Register the files in the MLflow run of this import, which another import of the same finds again."""
    stated = {
        registry.LICENCE_TAG: config.licence,
        registry.ORIGIN_TAG: config.origin,
        "mae.exported_from": read.provenance.model if read.provenance else "",
    }
    tags = {"mae.imported": found.what, **{tag: value for tag, value in stated.items() if value}}
    key = _key(found, config)
    tracking = registry.open_tracking(config.experiment)
    run = tracking.find_run(key)
    is_new = run is None
    if run is None:
        values = {"source": source, "what": found.what, "notes": list(found.notes), **to_dict(config)}
        run = tracking.run(f"import-{config.name}-{key[-8:]}", "import", values, key=key)
    description = f"Imported from {read.name}: {found.what}; {found.summary}."
    try:
        if found.kind == "classifier":
            ref = registry.register_classifier(run, found.files, None, config.name, description=description, tags=tags)
        else:
            ref = registry.register_backbone(run, found.files, config.name, description=description, tags=tags)
    finally:
        if is_new:
            run.finish("FINISHED")
    return {
        "model": ref.uri,
        "kind": found.kind,
        "what": found.what,
        "summary": found.summary,
        "notes": list(found.notes),
        "licence": config.licence,
        "origin": config.origin,
        "run_id": run.id,
    }


def _key(found: Import, config: ImportConfig) -> str:
    """Identify an import by the content of its files and what is stated about them."""
    digest = hashlib.sha256(json.dumps([config.name, config.licence, config.origin]).encode())
    for name, content in sorted(found.files.items()):
        digest.update(name.encode())
        digest.update(content if isinstance(content, bytes) else content.read_bytes())
    return f"import:{digest.hexdigest()}"
