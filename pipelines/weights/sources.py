"""Where imported weights come from: a file, a folder of transformers, timm or this project, or timm's hub."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_core.config import ModelConfig
from mae_core.errors import UserError
from mae_core.formats.hints import Hints, from_arguments, from_transformers, normalization_of
from mae_core.formats.reading import Checkpoint, read_checkpoint
from mae_core.normalization import Normalization
from mae_core.pretrained import load_classifier, load_encoder, load_mae
from pipelines.config import from_dict
from pipelines.registry import PROVENANCE, Provenance, sha256_of
from pipelines.storage import Storage, open_storage, storage_of

_TIMM = "timm:"


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """Tensors of another project, and what came with them."""

    name: str
    checkpoint: Checkpoint
    hints: Hints
    normalization: Normalization | None = None
    licence: str = ""
    """Licence that the source states."""
    provenance: Provenance | None = None
    """Of weights that `mae export` wrote."""


@dataclass(frozen=True, kw_only=True)
class OwnExport:
    """A folder that this project exported: its files, which need no conversion."""

    name: str
    kind: str
    files: dict[str, Path]
    config: dict[str, Any]
    provenance: Provenance | None = None


def read_source(source: str, scratch: Path) -> ForeignWeights | OwnExport:
    """Read the weights that SOURCE names; files of S3 go through `scratch`.

    Raises UserError if there are none, or if they are in a format that is not read, such as transformers' .bin.
    """
    if source.startswith(_TIMM):
        return _from_timm(source.removeprefix(_TIMM))
    storage = open_storage(source)
    if storage.exists("config.json"):
        return _from_folder(storage, scratch)
    parent, name = storage_of(source)
    if not parent.exists(name):
        raise UserError(f"there is nothing at {source}; give a file or folder of weights, or {_TIMM}MODEL.TAG")
    if parent.is_folder(name):
        raise UserError(
            f"{source} is a folder without config.json; give the file of weights in it, or a folder of transformers "
            "or of this project"
        )
    path = _local(parent, name, scratch)
    checkpoint = read_checkpoint(path)
    return ForeignWeights(
        name=name,
        checkpoint=checkpoint,
        hints=from_arguments(checkpoint.arguments),
        provenance=_provenance(parent, [path]),
    )


def _from_folder(storage: Storage, scratch: Path) -> ForeignWeights | OwnExport:
    """Read a folder whose config.json says which project's it is."""
    name, config = storage.uri.rpartition("/")[2], _json(storage, "config.json")
    if "model_type" in config:
        return _from_transformers(storage, name, config, scratch)
    if "architecture" in config:
        return _from_timm_folder(storage, name, config, scratch)
    if config.get("kind") not in ("backbone", "classifier"):
        raise UserError(
            f"{storage.uri}/config.json has neither transformers' model_type, nor timm's architecture, nor a kind of "
            "this project; give a folder of one of them, or the file of weights alone"
        )
    return _from_own(storage, name, config, scratch)


def _from_transformers(storage: Storage, name: str, config: dict[str, Any], scratch: Path) -> ForeignWeights:
    hints = from_transformers(config)
    paths = [path for path, _ in storage.list(suffix=".safetensors") if "/" not in path]
    shards = [path for path in paths if path == "model.safetensors" or path.startswith("model-")]
    if not shards:
        pickles = [path for path, _ in storage.list(suffix=".bin") if "/" not in path]
        found = f"only {pickles[0]}, a pickle," if pickles else "no model.safetensors"
        raise UserError(
            f"{storage.uri} holds {found} and pickles of transformers are not read; if you trust it, convert it with "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    local = [_local(storage, path, scratch) for path in shards]
    checkpoints = [read_checkpoint(path) for path in local]
    tensors = {name: tensor for checkpoint in checkpoints for name, tensor in checkpoint.tensors.items()}
    preprocessor = _json(storage, "preprocessor_config.json") if storage.exists("preprocessor_config.json") else {}
    return ForeignWeights(
        name=name,
        checkpoint=Checkpoint(tensors=tensors),
        hints=hints,
        normalization=normalization_of(preprocessor),
        provenance=_provenance(storage, local),
    )


def _from_timm_folder(storage: Storage, name: str, config: dict[str, Any], scratch: Path) -> ForeignWeights:
    """Read a folder as timm's hub has it. Raises UserError without model.safetensors, or if it is no plain ViT."""
    if not storage.exists("model.safetensors"):
        raise UserError(f"{storage.uri} has timm's config.json but no model.safetensors; fetch the folder again")
    hints, pretrained = _hints_of_config(config, storage.uri), config.get("pretrained_cfg", {})
    path = _local(storage, "model.safetensors", scratch)
    return ForeignWeights(
        name=name,
        checkpoint=read_checkpoint(path),
        hints=hints,
        normalization=_mean_and_std(pretrained),
        licence=pretrained.get("license") or "",
        provenance=_provenance(storage, [path]),
    )


def _hints_of_config(config: Mapping[str, Any], where: str) -> Hints:
    """Read timm's config.json: a model of timm by name, never one to fetch, and arguments of a plain ViT.

    Raises UserError if timm has no such model or cannot build it.
    """
    import timm
    from timm.models import VisionTransformer

    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise UserError(f"timm has no {architecture!r}, which {where}/config.json names; give the weights' file alone")
    stated = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    known = inspect.signature(VisionTransformer).parameters
    arguments = {key: value for key, value in (stated | config.get("model_args", {})).items() if key in known}
    try:
        hints = _hints_of(architecture, **arguments)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"timm cannot build the model of {where}/config.json ({error}); give the file of weights alone"
        ) from error
    return dataclasses.replace(hints, classes=tuple(map(str, config.get("label_names", ()))))


def _mean_and_std(pretrained: Mapping[str, Any]) -> Normalization | None:
    mean, std = pretrained.get("mean"), pretrained.get("std")
    return Normalization(mean=tuple(mean), std=tuple(std)) if mean and std else None


def _provenance(storage: Storage, weights: Sequence[Path]) -> Provenance | None:
    """Read what `mae export` or a run noted about the weights; None if nothing, or if they were changed since."""
    if not storage.exists(PROVENANCE):
        return None
    found = Provenance.parse(storage.read(PROVENANCE), storage.join(PROVENANCE))
    is_same = all(found.sha256.get(path.name) == sha256_of(path) for path in weights) if found.sha256 else True
    return found if is_same else None


def _from_own(storage: Storage, name: str, config: dict[str, Any], scratch: Path) -> OwnExport:
    """Read and load an export of this project, so that a damaged one is refused."""
    is_backbone = config["kind"] == "backbone"
    wanted = ("encoder.safetensors", "mae.safetensors") if is_backbone else ("classifier.safetensors",)
    files = {f: _local(storage, f, scratch) for f in ("config.json", *wanted) if storage.exists(f)}
    folder = files["config.json"].parent
    try:
        if not is_backbone:
            load_classifier(folder)
        else:
            from_dict(ModelConfig, config["model"])
            load_encoder(folder)
            if "mae.safetensors" in files:
                load_mae(folder)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{storage.uri} is no complete export ({error}); export or copy it again") from error
    weights = [path for file, path in files.items() if file != "config.json"]
    return OwnExport(
        name=name, kind=config["kind"], files=files, config=config, provenance=_provenance(storage, weights)
    )


def _from_timm(model: str) -> ForeignWeights:
    """Fetch a model's safetensors from timm's hub, and read what else its code and config say.

    Raises UserError if timm has no such model or tag, if it is no plain ViT, or if the hub does not answer.
    """
    from huggingface_hub import hf_hub_download
    from timm.models import get_pretrained_cfg

    try:
        pretrained = get_pretrained_cfg(model)
    except RuntimeError as error:
        raise UserError(f"timm has no {model!r} ({error}); list what it has with {_LIST}") from error
    if pretrained is None or not pretrained.hf_hub_id:
        raise UserError(f"timm has no pretrained {model!r}; list what it has with {_LIST}")
    hints = _hints_of(model)
    try:
        path = hf_hub_download(pretrained.hf_hub_id, "model.safetensors")
    except Exception as error:
        # The hub's client raises errors of its own, of requests and of the operating system.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot fetch {pretrained.hf_hub_id} from the hub ({reason}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, or give a file that you fetched elsewhere"
        ) from error
    return ForeignWeights(
        name=model,
        checkpoint=read_checkpoint(Path(path)),
        hints=hints,
        normalization=Normalization(mean=tuple(pretrained.mean), std=tuple(pretrained.std)),
        licence=pretrained.license or "",
    )


def _hints_of(model: str, **arguments: Any) -> Hints:
    """Read off timm's module, built without memory, what its tensors do not say. Raises UserError if it is no ViT."""
    import timm
    import torch
    from timm.models import VisionTransformer

    with torch.device("meta"):
        vit = timm.create_model(model, **arguments)
    first: Any = vit.blocks[0] if isinstance(vit, VisionTransformer) else None
    if not isinstance(vit, VisionTransformer) or type(first.mlp.act) is not torch.nn.GELU:
        raise UserError(f"timm's {model} is a {type(vit).__name__}, not a plain ViT with GELU; give a vit_* model")
    height_px, width_px = vit.patch_embed.img_size
    pool = vit.global_pool if vit.num_classes else ""
    return Hints(
        image_px=(height_px, width_px),
        heads=first.attn.num_heads,
        norm_eps=first.norm1.eps,
        pool="avg" if pool == "avg" else "token" if pool == "token" else None,
    )


_LIST = "`python -c \"import timm; print(timm.list_pretrained('vit_*'))\"`"


def _local(storage: Storage, path: str, scratch: Path) -> Path:
    """Return the local path of a file, after a copy to `scratch` if the storage is remote."""
    if storage.is_local:
        return Path(storage.join(path))
    copy = scratch / path
    copy.write_bytes(storage.read(path))
    return copy


def _json(storage: Storage, path: str) -> dict[str, Any]:
    try:
        values = json.loads(storage.read(path))
    except ValueError as error:
        raise UserError(f"{storage.join(path)} is not JSON ({error}); copy or fetch it again") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{storage.join(path)} is a {type(values).__name__} instead of an object; fetch it again")
    return dict(values)
