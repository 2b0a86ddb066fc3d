"""Find out from the names of tensors what a file of weights is, and name what it is not."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mae_core.errors import UserError
from mae_core.formats.ours import Kind

Naming = Literal["fair", "timm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a file of weights is."""

    what: str
    naming: Naming
    kind: Kind
    keys: tuple[str, ...]
    """Names that tell."""


KNOWN = (
    Recognised(
        what="an MAE, encoder and decoder, of the reference",
        naming="fair",
        kind="mae",
        keys=("cls_token", "decoder_embed.weight"),
    ),
    Recognised(
        what="ViTMAEForPreTraining of transformers",
        naming="transformers",
        kind="mae",
        keys=("vit.embeddings.cls_token", "decoder.decoder_embed.weight"),
    ),
    Recognised(
        what="ViTForImageClassification of transformers",
        naming="transformers",
        kind="classifier",
        keys=("vit.embeddings.cls_token", "classifier.weight"),
    ),
    Recognised(
        what="the encoder of a transformers model",
        naming="transformers",
        kind="encoder",
        keys=("vit.embeddings.cls_token",),
    ),
    Recognised(
        what="ViTModel of transformers",
        naming="transformers",
        kind="encoder",
        keys=("embeddings.cls_token", "pooler.dense.weight"),
    ),
    Recognised(
        what="ViTMAEModel, or ViTModel without a pooler, of transformers",
        naming="transformers",
        kind="encoder",
        keys=("embeddings.cls_token", "layernorm.weight"),
    ),
    Recognised(
        what="a linear probe of the reference",
        naming="fair",
        kind="classifier",
        keys=("cls_token", "head.0.running_mean", "head.1.weight"),
    ),
    Recognised(
        what="a classifier on the mean of the patch tokens, of the reference or timm",
        naming="timm",
        kind="classifier",
        keys=("cls_token", "fc_norm.weight", "head.weight"),
    ),
    Recognised(
        what="a classifier on the class token, of timm",
        naming="timm",
        kind="classifier",
        keys=("cls_token", "norm.weight", "head.weight"),
    ),
    Recognised(
        what="an encoder of the reference or timm", naming="timm", kind="encoder", keys=("cls_token", "norm.weight")
    ),
)
"""What can be imported; the first entry whose keys are all there."""

# pattern in any name, what such a file is
_WRONG = (
    (r"exp_avg|momentum_buffer|^param_groups", "an optimizer's state"),
    (r"(^|\.)layer[1-4]\.0\.conv1\.weight", "a ResNet"),
    (r"dwconv\.weight|conv_dw\.weight", "a convolutional network"),
    (r"^layers\.\d+\.blocks\.\d+\.attn\.relative_position", "a Swin Transformer"),
    (
        r"rel(ative)?_pos(ition)?_bias|attn\.q_bias|\.gamma_1$|\.lambda_1$",
        "a BEiT, or another ViT with relative positions",
    ),
    (r"^(teacher|student)\.|last_layer\.weight_[gv]|head\.mlp\.\d", "a training checkpoint of DINO"),
    (r"ls1\.gamma|layer_scale1|reg(ister)?_tokens?$", "a DINOv2, or another ViT with layer scale or register tokens"),
    (r"text_projection|logit_scale|^visual\.|vision_model\.|norm_pre\.|pre_layrnorm", "a CLIP"),
    (r"attn_pool\.", "a ViT with attention pooling, such as SigLIP"),
    (r"dist(illation)?_token|head_dist", "a distilled DeiT"),
    (r"[qk]_norm\.", "a ViT that normalizes queries and keys"),
    (r"mlp\.w12|mlp\.fc1_[gx]", "a ViT with gated MLPs"),
    (r"^decoder\.0\.(weight|bias)", "a SimMIM"),
    (r"word_embeddings|embed_tokens|(^|\.)wte\.", "a language model"),
)
_UNUSED = {
    "pooler.dense.weight": "the pooler",
    "pooler.dense.bias": "the pooler",
    "mask_token": "a mask token without a decoder",
    "embeddings.mask_token": "a mask token without a decoder",
    "vit.embeddings.mask_token": "a mask token without a decoder",
    "vit.pooler.dense.weight": "the pooler",
    "vit.pooler.dense.bias": "the pooler",
    "head.0.num_batches_tracked": "",
}


def recognise(names: Collection[str], what: str) -> Recognised:
    """Return what tensors of these names are. Raises UserError that names what else file `what` is, with its keys."""
    for pattern, wrong in _WRONG:
        found = sorted(name for name in names if re.search(pattern, name))
        if found:
            raise UserError(f"{what} is {wrong} (keys {_listed(found)}), not an MAE or plain ViT; {_REMEDY}")
    if {"encoder.cls_token", "decoder.embed.weight"} <= set(names):
        raise UserError(
            f"{what} is an MAE of this project (keys encoder.cls_token, decoder.embed.weight); give the folder that "
            "also holds its config.json"
        )
    for known in KNOWN:
        if set(known.keys) <= set(names):
            return known
    if "fc_norm.weight" in names and "head.weight" not in names:
        raise UserError(
            f"{what} is an encoder without a final norm (keys fc_norm.weight, no norm.weight or head.weight): "
            "fine-tuning on the mean of tokens removed it; give the classifier with its head, or the pretrained encoder"
        )
    if "patch_embed.proj.weight" in names and "cls_token" not in names:
        raise UserError(
            f"{what} is a ViT without a class token (key patch_embed.proj.weight, no cls_token), which this project's "
            f"encoder has; {_REMEDY}"
        )
    raise UserError(f"{what} is unknown (keys {_listed(sorted(names))}); {_REMEDY}")


def without_unused(tensors: Mapping[str, Tensor], found: Recognised) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drop tensors that the computation never uses; return the rest and what was dropped, in words."""
    unused = {name: words for name, words in _UNUSED.items() if name in tensors}
    if found.kind == "mae":
        unused.pop("mask_token", None)
    kept = {name: tensor for name, tensor in tensors.items() if name not in unused}
    return kept, tuple(dict.fromkeys(filter(None, unused.values())))


_REMEDY = (
    "give weights of the reference's MAE, a timm ViT (vit_*), or a transformers ViTMAE or ViT, as docs/weights.md lists"
)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
