"""Write tensors and configs as timm, transformers or the reference have them, and check what was written.

Each function writes to a folder of this machine and returns the line that loads the result from `place`, where the
folder will be. Tensors are read back and must be identical.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae_core.config import parse_arch
from mae_core.formats import fair, timm, transformers
from mae_core.formats.configs import (
    TransformersClass,
    timm_arguments,
    timm_config,
    timm_eps,
    timm_name,
    timm_overlay,
    transformers_config,
    transformers_preprocessor,
)
from mae_core.formats.reading import read_checkpoint
from pipelines.weights.exportable import Exportable

_TRANSFORMERS_CLASSES: Mapping[str, TransformersClass] = {
    "mae": "ViTMAEForPreTraining",
    "encoder": "ViTModel",
    "classifier": "ViTForImageClassification",
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format's function wrote."""

    load: str
    """The line of Python that loads it as `model`, or `session`, or `tensors`."""
    use: str
    """How to call what the line loads."""
    checked: str
    notes: tuple[str, ...] = ()


def write_timm(model: Exportable, folder: Path, place: str) -> Written:
    """Write model.safetensors, and config.json as timm's hub has it."""
    tensors = timm.from_ours(model.tensors)
    _save(tensors, folder / "model.safetensors")
    config = timm_config(model.model, model.normalization, classes=model.classes, pool=model.pool)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _check(model, timm.to_ours(read_checkpoint(folder / "model.safetensors").tensors))
    arguments = timm_arguments(model.model, num_classes=len(model.classes), pool=model.pool)
    overlay = timm_overlay(model.model, model.normalization, len(model.classes))
    words = [f"{key}={value!r}" for key, value in arguments.items()]
    eps, name, notes = timm_eps(model.model), timm_name(model.model), []
    if eps is not None:
        words.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps!r})")
        notes.append(f"Its layer norms have epsilon {eps:g}, timm's 1e-06: the line passes it, config.json cannot.")
    if "img_size" in arguments or "patch_size" in arguments or "embed_dim" in arguments:
        notes.append(f"timm has no model of this size; the line gives VisionTransformer's arguments over {name}.")
    if eps is None:
        notes.append('timm.create_model("local-dir:FOLDER", pretrained=True) reads the same from config.json.')
    said = ", ".join(f"{key}={value!r}" for key, value in overlay.items())
    return Written(
        load=(
            f"import {'functools, timm, torch' if eps is not None else 'timm'}; "
            f"model = timm.create_model({name!r}, pretrained=True, "
            f"pretrained_cfg_overlay=dict(file={f'{place}/model.safetensors'!r}, {said}), {', '.join(words)}).eval()"
        ),
        use=(
            "`model(images)` are logits"
            if model.classes
            else "`model.forward_features(images)` are the class token, then the patch tokens; "
            f"`[:, {model.model.class_tokens}:].mean(1)` of it is the embedding that this project computes"
        ),
        checked="tensors read back are identical",
        notes=tuple(notes),
    )


def write_transformers(model: Exportable, folder: Path, place: str) -> Written:
    """Write model.safetensors, config.json and preprocessor_config.json."""
    kind = _TRANSFORMERS_CLASSES[model.kind]
    config = transformers_config(model.model, kind, model.classes)
    _save(transformers.from_ours(model.tensors), folder / "model.safetensors")
    preprocessor = transformers_preprocessor(model.model, model.normalization)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
    _check(model, transformers.to_ours(read_checkpoint(folder / "model.safetensors").tensors))
    uses = {
        "ViTModel": "`model(images).last_hidden_state` are the class token, then the patch tokens",
        "ViTMAEForPreTraining": "`model(images).loss`; `model.vit` is the encoder",
        "ViTForImageClassification": "`model(images).logits`",
    }
    height_px, width_px = model.model.image_px
    notes = ["AutoImageProcessor.from_pretrained(FOLDER) is the preprocessing."]
    if height_px != width_px:
        notes.append("The input is not square, so the processor crops more of the longer side than evaluation does.")
    return Written(
        load=(
            f"import transformers; model = transformers.{kind}.from_pretrained({place!r}"
            f"{', add_pooling_layer=False' if kind == 'ViTModel' else ''}).eval()"
        ),
        use=uses[kind],
        checked="tensors read back are identical",
        notes=tuple(notes),
    )


def write_fair(model: Exportable, folder: Path, place: str) -> Written:
    """Write model.pth, a dictionary {"model": tensors} of the reference's names, which weights_only=True reads."""
    tensors = {name: tensor.contiguous() for name, tensor in fair.from_ours(model.tensors).items()}
    torch.save({"model": tensors}, folder / "model.pth")
    _check(model, fair.to_ours(read_checkpoint(folder / "model.pth").tensors))
    notes = []
    if model.kind == "mae" and (model.model.channels != 3 or model.model.image_px[0] != model.model.image_px[1]):
        notes.append("The reference's own loss takes square images of 3 channels only: `patchify` must be adapted.")
    return Written(
        load=f"import torch; tensors = torch.load({f'{place}/model.pth'!r}, weights_only=True)['model']",
        use=f"in the reference's repository: `{_reference_constructor(model)}.load_state_dict(tensors)`",
        checked="tensors read back are identical",
        notes=tuple(notes),
    )


def _reference_constructor(model: Exportable) -> str:
    """Return the call that builds the model in the reference's repository."""
    config, arch = model.model, parse_arch(model.model.arch)
    size_px = config.image_px[0] if config.image_px[0] == config.image_px[1] else config.image_px
    arguments: dict[str, Any] = {
        "img_size": size_px,
        "patch_size": config.patch_px,
        "in_chans": config.channels,
        "embed_dim": arch.width,
        "depth": arch.depth,
        "num_heads": arch.heads,
        "mlp_ratio": 4,
    }
    if model.kind == "mae":
        arguments |= {
            "decoder_embed_dim": config.decoder_width,
            "decoder_depth": config.decoder_depth,
            "decoder_num_heads": config.decoder_heads,
            "norm_pix_loss": config.target == "norm_pixels",
        }
    else:
        arguments |= {"qkv_bias": True, "num_classes": len(model.classes), "global_pool": model.pool == "avg"}
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    owner = "models_mae.MaskedAutoencoderViT" if model.kind == "mae" else "models_vit.VisionTransformer"
    return f"{owner}({words}, norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_eps!r}))"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # transformers refuses files without this entry.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _check(model: Exportable, found: Mapping[str, Tensor]) -> None:
    assert found.keys() == model.tensors.keys(), "a format writes each tensor once"
    assert all(torch.equal(found[name], tensor) for name, tensor in model.tensors.items()), "bit for bit"
