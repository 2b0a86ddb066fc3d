"""A run's weights become a model version: everything is uploaded and verified before any name points to it."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import mae_core
from mae_core.errors import UserError
from pipelines.registry.patience import patiently
from pipelines.registry.runs import Run
from pipelines.registry.versions import PARENT_TAG, SHA256_TAG, ModelRef, check_file_name, ref_of, sha256_of

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "candidate"
"""Alias of the newest version that finished."""
Content = bytes | Path
_BACKBONE = ("encoder.safetensors", "mae.safetensors", "config.json")
_CLASSIFIER = ("classifier.safetensors", "config.json")
_SUFFIXES = (".safetensors", ".json", ".png")
_REQUIREMENTS = ("jaxtyping", "mlflow", "numpy", "pandas", "pillow", "safetensors", "simplejpeg", "timm", "torch")


def register_backbone(
    run: Run, files: dict[str, Content], model_name: str, *, description: str = "", tags: dict[str, str] | None = None
) -> ModelRef:
    """A new version of the model, complete, with alias @candidate; the same files of the same run register once.

    `files` needs encoder.safetensors, mae.safetensors and config.json; manifest.json and reconstructions.png may be
    among them.
    """
    _check(files, _BACKBONE)
    return _register(run, files, model_name, description, {"mae.kind": "backbone", **(tags or {})})


def register_classifier(
    run: Run,
    files: dict[str, Content],
    backbone: ModelRef | None,
    model_name: str = "",
    *,
    description: str = "",
    tags: dict[str, str] | None = None,
) -> ModelRef:
    """A new version of `<backbone>-classifier`, or of the given name, that says which backbone it came from.

    Classes and preprocessing of config.json are tags too. Without a backbone (trained from scratch) a name is needed.
    """
    _check(files, _CLASSIFIER)
    if not (model_name or backbone):
        raise UserError("a classifier trained from scratch has no backbone to be named after; set tracking.name")
    config = json.loads(_read(files["config.json"]))
    said = {key: json.dumps(config[key])[:5000] for key in ("classes", "image_px", "pixels") if key in config}
    if backbone is not None:
        said[PARENT_TAG] = backbone.uri
    name = model_name or f"{backbone.name}-classifier"  # pyright: ignore[reportOptionalMemberAccess]
    return _register(run, files, name, description, {"mae.kind": "classifier", **said, **(tags or {})})


def _register(run: Run, files: dict[str, Content], model_name: str, description: str, tags: dict[str, str]) -> ModelRef:
    if not model_name.strip() or set(model_name) & set("/:@"):
        raise UserError(f"model name {model_name!r} is empty or holds one of / : @; try mae-vit_base_patch16")
    with TemporaryDirectory(prefix="mae-register-") as scratch:
        paths = _stage(files, Path(scratch) / "files")
        tags = {**tags, **{f"{SHA256_TAG}{name}": sha256_of(path) for name, path in paths.items()}}
        version = _same_version(run, model_name, tags)
        if version is None:
            model_id = _upload(run, paths, model_name, tags, Path(scratch) / "model")
            version = _create_version(run, model_name, model_id, description, tags)
    _move_alias(run, version)
    return ref_of(version)


def _upload(run: Run, paths: dict[str, Path], model_name: str, tags: dict[str, str], folder: Path) -> str:
    """The files lie in MLflow as a logged model that is ready; returns its id."""
    from mlflow.entities import LoggedModelOutput

    client = run.client
    # A logged model's name may hold fewer characters than a registered one's.
    plain_name = re.sub(r"[^\w-]", "-", model_name)
    model = patiently(
        lambda: client.create_logged_model(
            run.experiment_id, name=plain_name, source_run_id=run.id, tags=tags, model_type=tags["mae.kind"]
        ),
        "the model",
    )
    _package(run, paths, model.model_id, model.artifact_location, folder)
    patiently(lambda: client.log_model_artifacts(model.model_id, str(folder)), "the model's files")
    patiently(lambda: client.finalize_logged_model(model.model_id, "READY"), "the model")
    patiently(lambda: client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)]), "the model")
    return model.model_id


def _package(run: Run, paths: dict[str, Path], model_id: str, location: str, folder: Path) -> None:
    """`folder` is an MLflow model from code: embedder.py, a copy of mae_core, and the files under artifacts/."""
    decoder = folder.with_name("mae_decode.py")
    shutil.copyfile(Path(__file__).parents[1] / "images" / "decode.py", decoder)
    with warnings.catch_warnings():
        # MLflow warns of its own type hints while it is imported, and of the input example that we leave out, since
        # it would be checked by loading the model, which costs more than all the rest.
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import ColSpec, Schema

        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("embedder.py")),
            artifacts={name: str(path) for name, path in paths.items()},
            code_paths=[str(Path(mae_core.__file__).parent), str(decoder)],
            # One unnamed column: a table, a list and an array of encoded images are all taken.
            signature=ModelSignature(inputs=Schema([ColSpec("binary")])),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS],
            mlflow_model=Model(artifact_path=location, model_uuid=model_id, run_id=run.id, model_id=model_id),
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def _create_version(run: Run, name: str, model_id: str, description: str, tags: dict[str, str]) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        patiently(lambda: run.client.create_registered_model(name), "the model's name")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

    def create() -> "ModelVersion":
        # An answer may have been lost: a version with these files is the one that was asked for.
        made = _same_version(run, name, tags)
        if made is not None:
            return made
        with _default_uri(run.client.tracking_uri):
            return run.client.create_model_version(
                name, f"models:/{model_id}", run.id, tags=tags, description=description or None, model_id=model_id
            )

    return patiently(create, "the model version")


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """MLflow's process-wide default is `uri` meanwhile: a sqlite registry looks a model up in that, not in its own."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _same_version(run: Run, name: str, tags: dict[str, str]) -> "ModelVersion | None":
    """The version that this run registered with the same files."""
    quoted = name.replace("'", "''")
    found = patiently(
        lambda: run.client.search_model_versions(f"name = '{quoted}' and run_id = '{run.id}'"), "the model"
    )
    wanted = {key: value for key, value in tags.items() if key.startswith(SHA256_TAG)}
    return next((v for v in found if wanted.items() <= dict(v.tags).items()), None)


def _move_alias(run: Run, version: "ModelVersion") -> None:
    """@candidate is this version, unless a newer one has it."""
    aliases: dict[str, Any] = patiently(lambda: run.client.get_registered_model(version.name), "the model").aliases
    if int(aliases.get(ALIAS, 0)) < int(version.version):
        patiently(lambda: run.client.set_registered_model_alias(version.name, ALIAS, str(version.version)), "the alias")


def _stage(files: dict[str, Content], folder: Path) -> dict[str, Path]:
    """Every file lies in `folder` under its own name."""
    folder.mkdir(parents=True)
    staged = {}
    for name, content in files.items():
        staged[name] = folder / name
        if isinstance(content, Path):
            shutil.copyfile(content, staged[name])
        else:
            staged[name].write_bytes(content)
    return staged


def _check(files: dict[str, Content], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in files]
    if missing:
        raise UserError(f"a model version needs {', '.join(needed)}, but {', '.join(missing)} is missing")
    for name in files:
        check_file_name(name)
        if not name.endswith(_SUFFIXES):
            raise UserError(f"file {name!r} is of no kind that a model version holds; only {', '.join(_SUFFIXES)}")


def _read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
