"""Register a run's weights as a model version: upload and verify everything, then move the alias."""

import io
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
from pipelines.registry.outages import retry
from pipelines.registry.runs import Run
from pipelines.registry.versions import SHA256_TAG, ModelRef, check_file_name, inherited_tags, ref_of, sha256_of

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "candidate"
"""Alias of the newest complete version."""
Content = bytes | Path
_BACKBONE = ("encoder.safetensors", "config.json")
_CLASSIFIER = ("classifier.safetensors", "config.json")
_SUFFIXES = (".safetensors", ".json", ".png")
_REQUIREMENTS = ("jaxtyping", "mlflow", "numpy", "pandas", "pillow", "safetensors", "simplejpeg", "timm", "torch")
_READERS = ("imagecodecs", "nibabel", "pydicom", "tifffile")
"""Further requirements of a model of images beyond 8 bits, as far as they are installed where it was trained."""


def register_backbone(
    run: Run,
    files: dict[str, Content],
    model_name: str,
    *,
    parent: ModelRef | None = None,
    description: str = "",
    tags: dict[str, str] | None = None,
) -> ModelRef:
    """Register a complete new version of the model and move alias @candidate to it.

    Idempotent: the same files of the same run register once. `files` must hold encoder.safetensors and config.json;
    mae.safetensors (missing if there is no decoder), manifest.json and reconstructions.png are optional. A version that
    continues `parent` gets its licence and origin. Raises UserError for a missing or unexpected file.
    """
    _check(files, _BACKBONE)
    inherited = inherited_tags(parent) if parent else {}
    return _register(run, files, model_name, description, {"mae.kind": "backbone", **inherited, **(tags or {})})


def register_classifier(
    run: Run,
    files: dict[str, Content],
    backbone: ModelRef | None,
    model_name: str = "",
    *,
    description: str = "",
    tags: dict[str, str] | None = None,
) -> ModelRef:
    """Register a new version of `<backbone>-classifier`, or of `model_name`, tagged with the backbone it came from.

    The backbone's licence and origin are tags of the classifier too.

    Classes and preprocessing are copied from config.json into tags. Without a backbone (training from scratch),
    `model_name` is required.
    """
    _check(files, _CLASSIFIER)
    if not (model_name or backbone):
        raise UserError("a classifier trained from scratch has no backbone to be named after; set tracking.name")
    config = json.loads(_read(files["config.json"]))
    described = {key: json.dumps(config[key])[:5000] for key in ("classes", "image_px", "pixels") if key in config}
    if backbone is not None:
        described |= inherited_tags(backbone)
    name = model_name or f"{backbone.name}-classifier"  # pyright: ignore[reportOptionalMemberAccess]
    return _register(run, files, name, description, {"mae.kind": "classifier", **described, **(tags or {})})


def _register(run: Run, files: dict[str, Content], model_name: str, description: str, tags: dict[str, str]) -> ModelRef:
    if not model_name.strip() or set(model_name) & set("/:@"):
        raise UserError(f"model name {model_name!r} is empty or contains one of / : @; try mae-vit_base_patch16")
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
    """Upload the files as a logged model and mark it ready; return its id."""
    from mlflow.entities import LoggedModelOutput

    client = run.client
    # A logged model's name allows fewer characters than a registered model's.
    plain_name = re.sub(r"[^\w-]", "-", model_name)
    model = retry(
        lambda: client.create_logged_model(
            run.experiment_id, name=plain_name, source_run_id=run.id, tags=tags, model_type=tags["mae.kind"]
        ),
        "the model",
    )
    _package(run, paths, model_name, model.model_id, model.artifact_location, folder)
    retry(lambda: client.log_model_artifacts(model.model_id, str(folder)), "the model's files")
    retry(lambda: client.finalize_logged_model(model.model_id, "READY"), "the model")
    retry(lambda: client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)]), "the model")
    return model.model_id


def _package(run: Run, paths: dict[str, Path], name: str, model_id: str, location: str, folder: Path) -> None:
    """Write an MLflow "model from code" to `folder`: embedder.py, a copy of mae_core, and the files in artifacts/."""
    decoder = folder.with_name("mae_decode")
    shutil.copytree(Path(__file__).parents[1] / "images" / "decode", decoder)
    with warnings.catch_warnings():
        # MLflow warns about its own type hints during import, and pandas about what MLflow does with the example.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import ColSpec, Schema

        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("embedder.py")),
            artifacts={file: str(path) for file, path in paths.items()},
            # A served model has no registry to compare its files with.
            model_config={"model": name, "sha256": {file: sha256_of(path) for file, path in paths.items()}},
            code_paths=[str(Path(mae_core.__file__).parent), str(decoder)],
            # One unnamed column accepts a table, a list or an array of encoded images.
            signature=ModelSignature(inputs=Schema([ColSpec("binary")])),
            input_example=_example(paths["config.json"]),  # pyright: ignore[reportArgumentType] -- None is allowed
            pip_requirements=list(_requirements(paths["config.json"])),
            mlflow_model=Model(artifact_path=location, model_uuid=model_id, run_id=run.id, model_id=model_id),
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def _example(config: Path) -> "pd.DataFrame | None":
    """Return a table with one image to send to the served model; None for a model of images beyond 8 bits."""
    import pandas as pd
    from PIL import Image

    values = json.loads(config.read_bytes())
    channels = values.get("channels", values.get("model", {}).get("channels", 3))
    if values.get("pixels", {}).get("values") is not None or channels not in (1, 3):
        return None
    file = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def _requirements(config: Path) -> Iterator[str]:
    """Yield the libraries with which the model runs, each with its version here."""
    reads_values = json.loads(config.read_bytes()).get("pixels", {}).get("values") is not None
    for name in (*_REQUIREMENTS, *(_READERS if reads_values else ())):
        try:
            yield f"{name}=={metadata.version(name).partition('+')[0]}"
        except metadata.PackageNotFoundError:
            assert name in _READERS, f"{name} is installed with this package"


def _create_version(run: Run, name: str, model_id: str, description: str, tags: dict[str, str]) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        retry(lambda: run.client.create_registered_model(name), "the model's name")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

    def create() -> "ModelVersion":
        # An earlier attempt may have succeeded while its response was lost.
        existing = _same_version(run, name, tags)
        if existing is not None:
            return existing
        with _default_uri(run.client.tracking_uri):
            return run.client.create_model_version(
                name, f"models:/{model_id}", run.id, tags=tags, description=description or None, model_id=model_id
            )

    return retry(create, "the model version")


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's process-wide default within the block: a sqlite registry looks models up there."""
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
    """Return the version that this run registered with the same files, if any."""
    quoted = name.replace("'", "''")
    versions = retry(
        lambda: run.client.search_model_versions(f"name = '{quoted}' and run_id = '{run.id}'"), "the model"
    )
    digests = {key: value for key, value in tags.items() if key.startswith(SHA256_TAG)}
    return next((v for v in versions if digests.items() <= dict(v.tags).items()), None)


def _move_alias(run: Run, version: "ModelVersion") -> None:
    """Point @candidate to this version, unless it already points to a newer one."""
    aliases: dict[str, Any] = retry(lambda: run.client.get_registered_model(version.name), "the model").aliases
    if int(aliases.get(ALIAS, 0)) < int(version.version):
        retry(lambda: run.client.set_registered_model_alias(version.name, ALIAS, str(version.version)), "the alias")


def _stage(files: dict[str, Content], folder: Path) -> dict[str, Path]:
    """Write every file to `folder` under its own name."""
    folder.mkdir(parents=True)
    staged = {}
    for name, content in files.items():
        staged[name] = folder / name
        if isinstance(content, Path):
            shutil.copyfile(content, staged[name])
        else:
            staged[name].write_bytes(content)
    return staged


def _check(files: dict[str, Content], required: tuple[str, ...]) -> None:
    missing = [name for name in required if name not in files]
    if missing:
        raise UserError(f"a model version needs {', '.join(required)}, but {', '.join(missing)} is missing")
    for name in files:
        check_file_name(name)
        if not name.endswith(_SUFFIXES):
            raise UserError(
                f"file {name!r} has a suffix that a model version does not allow; use {', '.join(_SUFFIXES)}"
            )


def _read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
