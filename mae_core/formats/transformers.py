"""Names of transformers' ViT and ViTMAE models, as in the files that its releases 4 and 5 both load.

Attention has separate queries, keys and values there; ours are joined in one `qkv`. Three spellings are read: that of
release 4 and of published files (`encoder.layer.0.attention.attention.query`, `decoder.decoder_layers.0`), that of
release 5's modules (`layers.0.attention.q_proj`), and that which release 5 saves decoders under
(`decoder.decoder_encoder.layer.0`). The first one is written.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.formats.ours import kind_of, refuse_mask_token_in_encoder, split_block

_BLOCK = re.compile(
    r"(?P<decoder>decoder\.)?(?:encoder\.layer|layers|decoder_layers|decoder_encoder\.layer)\.(?P<index>\d+)\."
    r"(?P<part>.+)\.(?P<leaf>weight|bias)"
)
# theirs in release 4 and published files, theirs in release 5's modules, ours
_PARTS = (
    ("attention.output.dense", "attention.o_proj", "attn.proj"),
    ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    ("output.dense", "mlp.fc2", "mlp.fc2"),
    ("layernorm_before", "layernorm_before", "norm1"),
    ("layernorm_after", "layernorm_after", "norm2"),
)
_QKV = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
)
_SINGLE = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("layernorm", "norm"),
)
_DECODER = (
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.decoder_pos_embed", "decoder.pos_embed"),
    ("decoder.decoder_embed", "decoder.embed"),
    ("decoder.decoder_norm", "decoder.norm"),
    ("decoder.decoder_pred", "decoder.pred"),
)
_HEAD = (("classifier", "head"),)
_OUR_PART = {theirs: ours for *spellings, ours in _PARTS for theirs in spellings}
_THEIR_PART = {ours: theirs for theirs, _, ours in _PARTS}
_QKV_INDEX = {theirs: index for index, spellings in enumerate(_QKV) for theirs in spellings}


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to ours and join queries, keys and values. Raises UserError for an unknown name."""
    prefix = "encoder." if any(name.startswith("decoder.") for name in tensors) else ""
    ours: dict[str, Tensor] = {}
    qkv: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name.removeprefix("vit."))
        if block is None:
            ours[_our_single(name, prefix)] = tensor
            continue
        stack = "decoder.blocks" if block["decoder"] else f"{prefix}blocks"
        where, part = f"{stack}.{block['index']}", block["part"]
        if part in _QKV_INDEX:
            qkv.setdefault(f"{where}.attn.qkv.{block['leaf']}", {})[_QKV_INDEX[part]] = tensor
        elif part in _OUR_PART:
            ours[f"{where}.{_OUR_PART[part]}.{block['leaf']}"] = tensor
        else:
            raise _unknown(name)
    for name, parts in qkv.items():
        if len(parts) != 3:
            raise UserError(f"{name} lacks queries, keys or values; the weights are incomplete: fetch them again")
        ours[name] = torch.cat([parts[0], parts[1], parts[2]])
    return ours


def from_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to those of ViTMAEForPreTraining, ViTForImageClassification, or ViTModel and ViTMAEModel.

    Which one depends on what the tensors are: a complete MAE, a classifier or an encoder. Raises UserError for what
    transformers has no model for: a classifier on the mean of the patch tokens, mask tokens in the encoder.
    """
    kind = kind_of(tensors)
    if "fc_norm.weight" in tensors:
        raise UserError(
            "the classifier takes the mean of the patch tokens (fc_norm), but transformers' ViTForImageClassification "
            "the class token; export to timm, or fine-tune with --classifier.pool token"
        )
    refuse_mask_token_in_encoder(tensors, "transformers")
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("encoder.")
        before = "vit." if kind != "encoder" and not name.startswith(("decoder.", "head.")) else ""
        block = split_block(plain)
        if block is None:
            theirs[before + _renamed(plain, [(b, a) for a, b in (*_SINGLE, *_DECODER, *_HEAD)])] = tensor
            continue
        stack, index, rest = block
        where = before + ("decoder.decoder_layers" if stack.startswith("decoder.") else "encoder.layer") + f".{index}"
        part, _, leaf = rest.rpartition(".")
        if part == "attn.qkv":
            for (theirs_part, _), third in zip(_QKV, tensor.chunk(3)):
                theirs[f"{where}.{theirs_part}.{leaf}"] = third.clone()
        else:
            theirs[f"{where}.{_THEIR_PART[part]}.{leaf}"] = tensor
    return theirs


def _our_single(name: str, prefix: str) -> str:
    """Rename a tensor outside the blocks."""
    if name.startswith("decoder."):
        return _renamed(name, _DECODER)
    if name.startswith("classifier."):
        return _renamed(name, _HEAD)
    return prefix + _renamed(name.removeprefix("vit."), _SINGLE)


def _renamed(name: str, pairs: "tuple[tuple[str, str], ...] | list[tuple[str, str]]") -> str:
    for old, new in pairs:
        if name == old or name in (f"{old}.weight", f"{old}.bias"):
            return new + name.removeprefix(old)
    raise _unknown(name)


def _unknown(name: str) -> UserError:
    return UserError(f"tensor {name!r} belongs to no ViT or ViTMAE of transformers; use one of these models")
