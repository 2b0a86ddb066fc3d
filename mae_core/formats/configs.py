"""Configs that go out with weights: what timm and transformers need to build the model and to preprocess its images.

Evaluation here resizes an image to cover 256/224 of the input, bicubic, and crops the centre. Both libraries can say
that; they do it to every image, though, while evaluation leaves an image of the input's size unchanged.
"""

from collections.abc import Mapping
from typing import Any, Literal

from mae_core.config import LAYER_NORM_EPS, ModelConfig, parse_arch
from mae_core.errors import UserError
from mae_core.normalization import Normalization

EVALUATION_CROP = 224 / 256
"""Side of the centre crop, as a share of the resized image's."""
_TIMM_PATCH_PX = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}
"""Patch of timm's model of each size, from which other patches differ by an argument."""
_BICUBIC = 3
"""Pillow's number of it, which transformers stores."""

TransformersClass = Literal["ViTMAEForPreTraining", "ViTForImageClassification", "ViTModel"]


def timm_name(model: ModelConfig) -> str:
    """Name the model of timm that is nearest to the architecture; `timm_arguments` makes it equal."""
    size = model.arch.split("_")[1]
    base = size if size in _TIMM_PATCH_PX else "tiny"
    return f"vit_{base}_patch{_TIMM_PATCH_PX[base]}_224"


def timm_arguments(model: ModelConfig, *, num_classes: int, pool: Literal["token", "avg"]) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer by which the model differs from `timm_name`.

    The epsilon of its layer norms is not among them, since it is an argument of a function: see `timm_eps`.
    """
    arch, size = parse_arch(model.arch), model.arch.split("_")[1]
    height_px, width_px = model.image_px
    found: dict[str, Any] = {"num_classes": num_classes}
    if pool == "avg":
        found["global_pool"] = "avg"
    if model.image_px != (224, 224):
        found["img_size"] = height_px if height_px == width_px else (height_px, width_px)
    if arch.patch_px != _TIMM_PATCH_PX.get(size, 16):
        found["patch_size"] = arch.patch_px
    if model.channels != 3:
        found["in_chans"] = model.channels
    if arch.class_tokens > 1:
        found["reg_tokens"] = arch.class_tokens - 1
    if size not in _TIMM_PATCH_PX:
        found |= {"embed_dim": arch.width, "depth": arch.depth, "num_heads": arch.heads}
    return found


def timm_eps(model: ModelConfig) -> float | None:
    """Return the epsilon of layer norms if it is not timm's."""
    return None if model.norm_eps == LAYER_NORM_EPS else model.norm_eps


def timm_overlay(model: ModelConfig, normalization: Normalization, num_classes: int) -> dict[str, Any]:
    """Return what timm's pretrained_cfg must say of the weights: classes, input, and preprocessing."""
    return {
        "num_classes": num_classes,
        "input_size": (model.channels, *model.image_px),
        "mean": normalization.mean,
        "std": normalization.std,
        "interpolation": "bicubic",
        "crop_pct": EVALUATION_CROP,
        "crop_mode": "center",
    }


def timm_config(
    model: ModelConfig, normalization: Normalization, *, classes: tuple[str, ...], pool: Literal["token", "avg"]
) -> dict[str, Any]:
    """Return a config.json as timm's hub has it, which `timm.create_model("local-dir:FOLDER")` reads too."""
    num_classes = len(classes)
    return {
        "architecture": timm_name(model),
        "num_classes": num_classes,
        "num_features": parse_arch(model.arch).width,
        "global_pool": pool,
        "model_args": timm_arguments(model, num_classes=num_classes, pool=pool),
        "pretrained_cfg": {
            **timm_overlay(model, normalization, num_classes),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **({"label_names": list(classes)} if classes else {}),
    }


def transformers_config(model: ModelConfig, kind: TransformersClass, classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the config.json of that class. Raises UserError for a decoder that ViTMAE cannot compute."""
    arch, (height_px, width_px) = parse_arch(model.arch), model.image_px
    found: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "vit_mae" if kind == "ViTMAEForPreTraining" else "vit",
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm_eps,
        "image_size": height_px if height_px == width_px else [height_px, width_px],
        "patch_size": arch.patch_px,
        "num_channels": model.channels,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if classes:
        found["id2label"] = {str(number): name for number, name in enumerate(classes)}
        found["label2id"] = {name: number for number, name in enumerate(classes)}
    if kind == "ViTMAEForPreTraining":
        found |= _vit_mae(model)
    return found


def _vit_mae(model: ModelConfig) -> Mapping[str, Any]:
    height_px, width_px = model.image_px
    if height_px != width_px:
        raise UserError(
            f"transformers' ViTMAEForPreTraining takes square images, but this model {height_px} x {width_px} px; "
            "export its encoder with --part encoder"
        )
    return {
        "decoder_hidden_size": model.decoder_width,
        "decoder_num_hidden_layers": model.decoder_depth,
        "decoder_num_attention_heads": model.decoder_heads,
        "decoder_intermediate_size": 4 * model.decoder_width,
        "mask_ratio": model.mask.ratio,
        "norm_pix_loss": model.target == "norm_pixels",
    }


def transformers_preprocessor(model: ModelConfig, normalization: Normalization) -> dict[str, Any]:
    """Return a preprocessor_config.json: resize, centre crop, scale, normalize. BitImageProcessor is what DINOv2 uses.

    An input that is not square is cropped from an image whose shorter side covers the input's longer one, since only
    the shorter side can be given.
    """
    height_px, width_px = model.image_px
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(max(height_px, width_px) / EVALUATION_CROP)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height_px, "width": width_px},
        # Values of another range are from 0 to 1 when they come here.
        "do_rescale": normalization.values is None,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(normalization.mean),
        "image_std": list(normalization.std),
    }
