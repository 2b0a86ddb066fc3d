"""The README.md beside exported weights: what they are, where they come from, and how to use them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mae_core.errors import UserError
from mae_core.formats.configs import EVALUATION_CROP
from mae_core.normalization import Normalization
from pipelines import registry
from pipelines.registry import ModelRef, Step, Tracking
from pipelines.weights.exportable import Exportable
from pipelines.weights.tensor_formats import Written

log = logging.getLogger(__name__)

PICTURE = "reconstructions.png"
_PRIVATE = ("output", "name", "source", "extend", "data.uri", "checkpoint.", "tracking.", "compute.")
"""Parameters of a run that say where it ran, not what it computed."""
_WORTH = ("train/", "val/", "test/")
"""Metrics that say what the model is worth, and not how the run went."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from, as far as the registry knows."""

    shown: str
    digest: str = ""
    licence: str = ""
    url: str = ""
    steps: tuple[Step, ...] = ()
    recipe: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def origin_of(tracking: Tracking, ref: ModelRef) -> Origin:
    """Ask the registry where a version comes from."""
    recipe, metrics = tracking.known_run(ref.run_id).record()
    try:
        steps = tracking.lineage(ref.uri)
    except UserError as error:  # a version that it came from was deleted
        log.warning("the card of %s has no lineage: %s", ref.uri, error)
        steps = []
    return Origin(
        shown=ref.uri,
        digest=next((step.facts.get("dataset", "") for step in steps if step.kind == "run"), ""),
        licence=ref.tags.get(registry.LICENCE_TAG, ""),
        url=ref.tags.get(registry.ORIGIN_TAG, ""),
        steps=tuple(steps),
        recipe={key: value for key, value in sorted(recipe.items()) if not key.startswith(_PRIVATE)},
        metrics={key: value for key, value in sorted(metrics.items()) if key.startswith(_WORTH)},
    )


def origin_of_folder(folder: Path, shown: str) -> Origin:
    """Read where the files of a folder come from, as far as they say it."""
    path = folder / registry.PROVENANCE
    if not path.is_file():
        return Origin(shown=shown)
    found = registry.Provenance.parse(path.read_bytes(), registry.PROVENANCE)
    return Origin(shown=found.model or shown, digest=found.dataset, licence=found.licence, url=found.origin)


def _scaled(normalization: Normalization) -> str:
    """Return in words how pixels become 0 to 1."""
    values = normalization.values
    if values is None:
        return "pixel / 255"
    if values.by == "set":
        limits = ", ".join(f"{low:g} to {high:g}" for low, high in zip(values.low, values.high))
        return f"{values.dtype} values, of each channel from {limits}, clipped and scaled to 0 to 1,"
    shares = "their own window" if values.kind == "voi" else "their smallest to their largest value"
    if values.percentiles is not None:
        shares = f"percentiles {values.percentiles[0]:g} to {values.percentiles[1]:g} of each image and channel"
    return f"{values.dtype} values, from {shares}, clipped and scaled to 0 to 1,"


def model_card(
    model: Exportable, origin: Origin, naming: str, written: Written, load: str, *, has_picture: bool
) -> str:
    """Return the card in Markdown; `load` is the line that loads the model from beside its folder."""
    config, normalization = model.model, model.normalization
    height_px, width_px = config.image_px
    facts = {
        "model": origin.shown,
        "architecture": config.arch,
        "what": _what(model),
        "licence": origin.licence or "not stated",
        "origin": origin.url or "trained by this project, or not stated",
        "trained on the dataset with digest": origin.digest or "unknown",
        "input size": f"{height_px} x {width_px} px, {config.channels} channel{'s' if config.channels > 1 else ''}",
        "input values": f"float32, ({_scaled(normalization)} - mean) / std, layout batch, channels, height, width",
        "mean": ", ".join(map(repr, normalization.mean)),
        "std": ", ".join(map(repr, normalization.std)),
        "resize and crop": f"bicubic with antialiasing, centre crop of {EVALUATION_CROP:g}; see below",
        "format": naming,
        "checked after writing": written.checked,
    }
    if model.classes:
        facts["classes"] = ", ".join(model.classes)
    parts = [f"# {origin.shown} for {naming}", _table(facts)]
    parts += ["## Load", f"```python\n{load}\n```", _sentence(written.use)]
    parts.append("\n".join(f"- {note}" for note in (*model.notes, *written.notes)))
    parts += [
        "## Preprocessing",
        "An image larger than the input in both dimensions is resized to cover 256/224 of it, then its centre is "
        "cropped. An image of exactly the input's size is used unchanged, and any other is resized to cover the input "
        "and cropped. Processors of other libraries resize and crop every image: turn that off for images that "
        "already have the input's size.",
    ]
    if origin.metrics:
        parts += ["## Metrics", _table({key: f"{value:.6g}" for key, value in origin.metrics.items()})]
    if origin.steps:
        parts += ["## Lineage", "\n".join(_step(step) for step in origin.steps)]
    if origin.recipe:
        parts += ["## Recipe", _table(dict(origin.recipe))]
    if has_picture:
        parts += ["## Reconstructions", f"![masked, reconstruction, original]({PICTURE})"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _what(model: Exportable) -> str:
    config = model.model
    if model.kind == "mae":
        pca = f"{config.pca_components} principal components of patches"
        target = {"norm_pixels": "normalized pixels", "pixels": "pixels", "pca": pca}[config.target]
        return f"masked autoencoder with decoder {config.decoder_depth} x {config.decoder_width}, predicts {target}"
    if model.kind == "classifier":
        return f"classifier of {len(model.classes)} classes on the {'mean' if model.pool == 'avg' else 'class token'}"
    return "encoder"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _step(step: Step) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in step.facts.items() if value)
    return f"- {step.kind} {step.id}{f' ({facts})' if facts else ''}"


def _table(rows: Mapping[str, str]) -> str:
    """Return a table of two columns; values cannot break out of their cell."""
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
