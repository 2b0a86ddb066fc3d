"""Read weights from a file into tensors: `.pth` by torch's restricted unpickler alone, or safetensors.

Steps: find the format from the first bytes; read; unwrap `model` or `state_dict`; strip a prefix that all names share.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mae_core.errors import UserError

_WRAPPERS = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|Trying to (?:load|instantiate) (?:unsupported )?(?:GLOBAL |class )?<?([\w.]+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors by name, and what else their file says."""

    tensors: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the training script, as reference checkpoints hold them."""
    stripped: str = ""
    """Prefix that every name had."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file. Raises UserError for another format, a damaged file, or a pickle of more than tensors and numbers.

    Nothing of a pickle is executed: torch's weights_only unpickler allows tensors, plain values and, for the arguments
    of the reference's script, argparse.Namespace.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return unwrap(_read_safetensors(path), path.name)
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return unwrap(_read_pickle(path), path.name)
    raise UserError(f"{path.name} is neither a torch file nor safetensors; give a .pth or .safetensors file of weights")


def unwrap(content: Any, what: str) -> Checkpoint:
    """Find the tensors in the content of a file named `what`. Raises UserError that names what else it holds."""
    if not isinstance(content, Mapping):
        raise UserError(f"{what} holds a {type(content).__name__} instead of named tensors; save a state_dict")
    arguments = content.get("args")
    inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    if not tensors:
        keys = sorted(map(str, content))
        if {"state", "param_groups"} <= content.keys():
            raise UserError(f"{what} is an optimizer's state (keys state, param_groups); give the file of the model")
        if {"student", "teacher"} <= content.keys():
            raise UserError(f"{what} is a training checkpoint of DINO (keys student, teacher), not an MAE")
        raise UserError(
            f"{what} holds no tensors under model or state_dict, but {', '.join(keys[:6]) or 'nothing'}; save the "
            "model's state_dict"
        )
    tensors, stripped = _without_shared_prefix(tensors)
    return Checkpoint(
        tensors=tensors,
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        stripped=stripped,
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path.name} is not a complete safetensors file ({error}); fetch it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        name = next(filter(None, found.groups()), "") if found else ""
        if not name:
            raise UserError(f"{path.name} is no complete torch file; fetch it again") from error
        raise UserError(
            f"{path.name} holds a pickled {name.rstrip('.')}, which could run code and is not read; if you trust the "
            "file, load it yourself and save its tensors with torch.save(checkpoint['model'], 'weights.pth')"
        ) from error
    except Exception as error:
        # torch documents none; a truncated file of its old format gives struct.error or IndexError, among others.
        first_line = str(error).partition("\n")[0][:120]
        raise UserError(f"{path.name} is no complete torch file ({first_line}); fetch it again") from error


def _without_shared_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Strip prefixes that wrappers add, such as DDP's `module.`, if every name has them."""
    stripped = ""
    while True:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), "")
        if not prefix:
            return tensors, stripped
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped += prefix
