"""`mae export`: write a model version in the format of another project, with a card and the line that loads it."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import ExportConfig
from pipelines.storage import Storage, open_storage
from pipelines.weights.exportable import Exportable, load_exportable
from pipelines.weights.model_card import PICTURE, Origin, model_card, origin_of, origin_of_folder
from pipelines.weights.programs import write_onnx, write_torch
from pipelines.weights.tensor_formats import Written, write_fair, write_timm, write_transformers

_WEIGHTS = (".safetensors", ".pth", ".onnx", ".data", ".pt2")


def export_model(source: str, out: str, config: ExportConfig) -> dict[str, Any]:
    """Write the model of SOURCE to the folder OUT; return the line that loads it and how it was checked.

    It is written and checked on this machine before the first file reaches OUT; README.md comes last.

    Raises UserError if OUT is not empty, or if the format cannot hold the model.
    """
    target = open_storage(out)
    if not target.is_empty():
        raise UserError(f"{target.uri} is not empty; choose a new or empty folder")
    with TemporaryDirectory(prefix="mae-export-") as scratch:
        fetched, written_to = Path(scratch) / "version", Path(scratch) / "out"
        written_to.mkdir()
        origin = _fetch(source, fetched)
        model = load_exportable(fetched, source, config)
        place = target.uri if target.is_local else target.uri.rpartition("/")[2]
        written = _write(model, written_to, place, config)
        has_picture = (fetched / PICTURE).is_file()
        if has_picture:
            shutil.copyfile(fetched / PICTURE, written_to / PICTURE)
        # The card moves with the folder, so its line names the folder alone.
        inside = repr(place)[1:-1]
        load = written.load.replace(inside, inside.rpartition("/")[2])
        card = model_card(model, origin, config.format, written, load, has_picture=has_picture)
        (written_to / registry.PROVENANCE).write_bytes(_provenance(origin, written_to).to_json())
        (written_to / "README.md").write_text(card)
        files = _copy(written_to, target)
    return {
        "out": target.uri,
        "model": origin.shown,
        "kind": model.kind,
        "format": config.format,
        "files": files,
        "checked": written.checked,
        "notes": [*model.notes, *written.notes],
        "load": written.load,
    }


def _fetch(source: str, folder: Path) -> Origin:
    """Copy the files of a version or an export to `folder`; return where they come from."""
    if registry.is_registered(source):
        tracking = registry.open_tracking("mae")
        ref = tracking.resolve(source)
        tracking.fetch(ref, folder)
        return origin_of(tracking, ref)
    storage = open_storage(source)
    names = [name for name, _ in storage.list() if "/" not in name and name.endswith((".json", ".safetensors", ".png"))]
    if "config.json" not in names:
        raise UserError(
            f"{storage.uri} has no config.json; give models:/NAME@ALIAS, or the export/ folder of a finished run"
        )
    folder.mkdir()
    for name in names:
        with storage.open_input(name) as reading, (folder / name).open("wb") as writing:
            shutil.copyfileobj(reading, writing)
    return origin_of_folder(folder, storage.uri.rpartition("/")[2])


def _provenance(origin: Origin, folder: Path) -> registry.Provenance:
    """Return what goes out beside the weights, so that `mae import` elsewhere knows their licence and origin."""
    return registry.Provenance(
        model=origin.shown,
        dataset=origin.digest,
        licence=origin.licence,
        origin=origin.url,
        sha256={path.name: registry.sha256_of(path) for path in folder.iterdir() if path.suffix in _WEIGHTS},
    )


def _write(model: Exportable, folder: Path, place: str, config: ExportConfig) -> Written:
    match config.format:
        case "timm":
            return write_timm(model, folder, place)
        case "transformers":
            return write_transformers(model, folder, place)
        case "fair":
            return write_fair(model, folder, place)
        case "onnx":
            return write_onnx(model, folder, place, dynamic_size=config.dynamic_size)
        case "torch":
            return write_torch(model, folder, place, dynamic_size=config.dynamic_size)


def _copy(folder: Path, target: Storage) -> list[str]:
    """Copy the export to its place, the card last; return the names of the files."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == "README.md", name))
    for name in names:
        with (folder / name).open("rb") as reading, target.create(name) as writing:
            shutil.copyfileobj(reading, writing, 2**24)
    return names
